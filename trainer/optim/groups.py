"""Sorts parameters into groups: which of them decay, and the rate of each."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from strategies.errors import ConfigError
from trainer.optim.config import OptimConfig

BLOCK_NUMBER_REGEX = re.compile(r"(?:^|\.)(?:layers?|h|blocks?)\.(\d+)\.")
"""The number of a transformer block in a parameter's name."""
EMBEDDING_NAME_REGEX = re.compile(
    r"(?:^|\.)(?:embed_tokens|embed_positions|embed_in|embeddings?|word_embeddings|position_embeddings|wte|wpe|shared)\."
)
"""An input embedding, or a norm beside it, in a parameter's name."""


@dataclass(slots=True)
class ParameterGroup:
    """Parameters that share a learning rate and a weight decay."""

    lr: float
    weight_decay: float
    are_block_matrices: bool
    """Whether they are the matrices of blocks, which Muon orthogonalises."""
    names: list[str] = field(default_factory=list)
    parameters: list[nn.Parameter] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """The group in the form that torch's optimizers take."""
        return {"params": self.parameters, "lr": self.lr, "weight_decay": self.weight_decay}


def full_shape_of(parameter: nn.Parameter) -> Sequence[int]:
    """The full shape of a parameter. ZeRO-3 shows partitioned parameters as empty, and keeps their shape in `ds_shape`."""
    return getattr(parameter, "ds_shape", parameter.shape)


def group_parameters(
    config: OptimConfig,
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    model_names: Sequence[str],
    lr_factor: Callable[[str], float] = lambda _: 1.0,
) -> list[ParameterGroup]:
    """Sort parameters into groups of one learning rate and weight decay, for torch's optimizers.

    Groups come in the order in which the first parameter of each comes. Goes by full names and shapes, so that groups are the
    same under every strategy. Matrices decay, vectors (norms, biases) do not, and the user's rules in `config.groups` override
    that. `layer_decay` counts the blocks in `model_names` (all parameters, also frozen ones). `lr_factor`: the tuning method's
    own factors.

    Raises ConfigError for a rule that matches nothing, or for two rules that match one parameter.
    """
    parameters = dict(named_parameters)
    names = list(parameters)
    rule_name_by_parameter = _rule_name_by_parameter(config, names)
    factors = layer_factors(names, model_names or names, config.layer_decay)
    groups: dict[tuple[float, float, bool], ParameterGroup] = {}
    for name, parameter in parameters.items():
        dimensions = len(full_shape_of(parameter))
        # Vectors (norms and biases) do not decay.
        decay = config.weight_decay if dimensions >= 2 else 0.0
        factor = factors[name] * lr_factor(name)  # of its layer, and of the tuning method
        if name in rule_name_by_parameter:
            rule = config.groups[rule_name_by_parameter[name]]
            factor *= rule.lr_factor  # of the user's rule
            if rule.weight_decay is not None:
                decay = rule.weight_decay
        # Muon orthogonalises the matrices of blocks. Embeddings and heads are matrices too, and are left to AdamW.
        is_block_matrix = dimensions == 2 and BLOCK_NUMBER_REGEX.search(name) is not None
        key = (factor, decay, is_block_matrix)  # parameters with the same three share a group
        if key not in groups:
            groups[key] = ParameterGroup(
                lr=config.peak_lr * factor, weight_decay=decay, are_block_matrices=is_block_matrix
            )
        groups[key].names.append(name)
        groups[key].parameters.append(parameter)
    return list(groups.values())


def _rule_name_by_parameter(config: OptimConfig, names: list[str]) -> dict[str, str]:
    """Find out which rule of `optim.groups` (a rate and decay for parameters that match a pattern) holds for each parameter.

    `names`: of the trained parameters. Returns the rule's name by the parameter's; parameters without a rule are left out.
    Raises ConfigError for a rule that matches nothing, or two that match one parameter.
    """
    rule_name_by_parameter: dict[str, str] = {}
    for rule_name, rule in config.groups.items():
        matched = [name for name in names if re.search(rule.match, name)]
        key = f"optim.groups.{rule_name}.match={rule.match}"
        if not matched:
            examples = names
            if len(names) > 6:
                examples = [*names[:3], *names[-3:]]
            raise ConfigError(
                f"{key}: matches none of the {len(names)} trained parameters, such as {', '.join(examples)}"
            )
        for name in matched:
            if name in rule_name_by_parameter:
                raise ConfigError(
                    f"{key}: {name} is matched by optim.groups.{rule_name_by_parameter[name]} too; a parameter has one rule: "
                    "narrow one of them"
                )
        rule_name_by_parameter |= dict.fromkeys(matched, rule_name)
    return rule_name_by_parameter


def layer_factors(names: Sequence[str], model_names: Sequence[str], decay: float) -> dict[str, float]:
    """The factor of the learning rate by parameter name: `decay ** (layers + 1 - depth)`, so that lower layers learn slower.

    Layer-wise rates as of Clark et al. 2020 (arXiv:2003.10555) and BEiT. With 2 layers and a decay of 0.5: embeddings 0.125,
    block 0 0.25, block 1 0.5, the head 1. `names`: parameters that train; `model_names`: all, which show the number of layers.
    Embeddings have depth 0, block i has depth i + 1, and everything above the blocks has depth `layers + 1`. Each stack of an
    encoder-decoder counts from its own first block. Raises ConfigError if the names show no numbered blocks.
    """
    if decay == 1.0:
        return dict.fromkeys(names, 1.0)
    numbers = [int(match[1]) for name in model_names if (match := BLOCK_NUMBER_REGEX.search(name))]
    if not numbers:
        raise ConfigError(
            f"optim.layer_decay={decay:g}: the parameters of this model are not in numbered blocks, such as layers.0; "
            "set optim.layer_decay=1 and give rates with optim.groups"
        )
    # The last block has depth `max(numbers) + 1`, because embeddings have depth 0.
    top = max(numbers) + 2

    def depth(name: str) -> int:
        if match := BLOCK_NUMBER_REGEX.search(name):
            return int(match[1]) + 1
        if EMBEDDING_NAME_REGEX.search(name):
            return 0
        return top

    return {name: decay ** (top - depth(name)) for name in names}

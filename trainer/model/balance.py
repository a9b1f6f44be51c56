"""What a model adds to its loss: for its routers, balance of experts and a z-loss, and a z-loss for the output's logits.

Balance, as transformers computes it for the class (Fedus et al. 2021, arXiv:2101.03961): with f the share of the step's
tokens that rank an expert among their first k, and P the mean of its probability, `experts * sum(f * P)`, over all layers
together. f and P are taken over the whole global batch: P is a sum over tokens, and f, which has no gradient, is known
before the first backward pass. z-loss: the mean over tokens and layers of the squared logsumexp of the router's
logits (Zoph et al. 2022, arXiv:2202.08906). The same of the output's logits, over tokens, is what Bamba's class adds.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from strategies.errors import ConfigError
from trainer.model.architecture import text_model_config
from trainer.model.config import ModelConfig, ModelKind
from trainer.model.routing import ADDED_LOSS, RoutingRecord, balancing_biases, recorded_routers

BALANCE_WEIGHT_NAMES = ("router_aux_loss_coef", "aux_loss_coef")
"""What classes and configurations call the weight of the balancing loss."""
BALANCE_LOSS_FUNCTION_NAME = "load_balancing_loss_func"
"""What modules of transformers call their balancing loss."""


@dataclass(frozen=True, slots=True)
class RouterLosses:
    """What is added to the loss of a step for its routers."""

    balance_weight: float = 0.0
    """Weight of the balancing loss; 0: it is not added."""
    top_k: int = 1
    """Experts a token is counted for."""
    z_weight: float = 0.0
    """Weight of the z-loss; 0: it is not added."""

    def __bool__(self) -> bool:
        return bool(self.balance_weight or self.z_weight)

    def tokens_by_expert(self, record: RoutingRecord) -> Tensor:
        """How many tokens chose each expert (have it among their `top_k`), over all layers of a pass: int64 `[experts]`.

        `record`: the routers' logits of the pass. Padding does not count.
        """
        total = torch.zeros(record.logits[0].shape[-1], dtype=torch.int64, device=record.logits[0].device)
        with torch.no_grad():
            for logits in record.logits:
                chosen_experts = logits.softmax(-1).topk(self.top_k, dim=-1).indices
                is_token = record.token_mask(len(chosen_experts))
                if is_token is None:
                    counted = torch.ones_like(chosen_experts)
                else:
                    counted = is_token.long()[:, None].expand_as(chosen_experts)
                total.scatter_add_(0, chosen_experts.reshape(-1), counted.reshape(-1))
        return total

    def terms(self, record: RoutingRecord, tokens_by_expert: Tensor | None, num_tokens: int) -> dict[str, Tensor]:
        """What one micro-batch adds to the step's loss for its routers: `ADDED_LOSS` with its gradient, and each unweighted loss.

        Such as {"added_loss": ..., "router/balance_loss": ...}, 0-d tensors whose sum over micro-batches is the value of the
        step. `tokens_by_expert [experts]`: how many tokens of the whole step chose each expert, over all routers; None if there
        is no balancing loss. `num_tokens`: of the whole step.
        """
        num_decisions = float(num_tokens * len(record.logits))  # each router sends each token to experts
        losses: dict[str, Tensor] = {}
        total = record.logits[0].new_zeros((), dtype=torch.float32)
        masked_logits = [(logits, record.token_mask(len(logits))) for logits in record.logits]
        if tokens_by_expert is not None:
            shares = (tokens_by_expert.double() / num_decisions).float()
            probability_sums = [
                _sum_over_tokens(logits.float().softmax(-1), is_token) for logits, is_token in masked_logits
            ]
            # Switch Transformers, arXiv:2101.03961: smallest if all experts get the same share.
            balance = len(shares) * (shares * torch.stack(probability_sums).sum(0)).sum() / num_decisions
            total = total + self.balance_weight * balance
            losses["router/balance_loss"] = balance.detach()
        if self.z_weight:
            square_sums = [
                _sum_over_tokens(logits.float().logsumexp(-1).square(), is_token) for logits, is_token in masked_logits
            ]
            # ST-MoE, arXiv:2202.08906: keeps router logits small, whose softmax rounds badly in half precision.
            z = torch.stack(square_sums).sum() / num_decisions
            total = total + self.z_weight * z
            losses["router/z_loss"] = z.detach()
        return {ADDED_LOSS: total, **losses}


def _sum_over_tokens(values: Tensor, is_token: Tensor | None) -> Tensor:
    """The sum over positions that are tokens."""
    if is_token is not None:
        values = values * (is_token if values.dim() == 1 else is_token[:, None])
    return values.sum(0)


def router_losses_of_run(
    config: ModelConfig, hf_config: Any, meta_model: nn.Module, kind: ModelKind
) -> tuple[RouterLosses, dict[str, int], dict[str, str]]:
    """Decide which losses a run adds for its routers; returns (the losses, index of the logits in each router's output, notes).

    Routers are by the name of their module. Notes say, by setting, what the model's configuration asks for and is not done.
    `hf_config`: transformers' configuration; `meta_model`: its model on meta. Cases, in order:
    - neither the settings nor the configuration ask for such losses: none.
    - an encoder-decoder, or a model without routers that can be recorded: none; ConfigError if the settings ask for them.
    - the balancing loss does not fit the model: its weight is 0; ConfigError if the settings ask for it.
    - else: the weights of the settings; for the balancing loss that of the configuration if the setting is null.

    Raises ConfigError also for other settings that cannot be followed.
    """
    text_config = text_model_config(hf_config)
    notes: dict[str, str] = {}
    is_requested = bool(
        getattr(hf_config, "output_router_logits", False) or getattr(text_config, "output_router_logits", False)
    )
    if not is_requested and not config.router_aux_loss and not config.router_z_loss:
        return RouterLosses(), {}, notes
    output_index_by_router = {}
    if kind is ModelKind.encoder_decoder:
        reason = (
            f"routers are balanced in causal models and classifiers, and a {hf_config.model_type} is an encoder-decoder"
        )
    else:
        output_index_by_router = recorded_routers(meta_model)
        reason = f"a {hf_config.model_type} has no router whose logits transformers records"
    if not output_index_by_router:
        _refuse_router_settings(config, reason)
        if config.router_aux_loss is None:
            notes["model.router_aux_loss"] = f"0, although the model's configuration asks for it: {reason}"
        return RouterLosses(), {}, notes
    weight = config.router_aux_loss
    if weight is None:
        weight = float(_first_setting(meta_model, text_config, BALANCE_WEIGHT_NAMES) or 0.0) if is_requested else 0.0
    top_k = 1
    if weight:
        top_k = int(_first_setting(meta_model, text_config, ("num_experts_per_tok",)) or 1)
        difference = _balance_loss_difference(meta_model, top_k)
        if difference is not None:
            if balancing_biases(meta_model):
                difference += " (it is balanced by a bias, which stays as it was loaded)"
            if config.router_aux_loss:
                raise ConfigError(
                    f"model.router_aux_loss={weight:g}: a {hf_config.model_type} has {difference}; set model.router_aux_loss=0"
                )
            notes["model.router_aux_loss"] = f"0: a {hf_config.model_type} has {difference}"
            weight = 0.0
    return RouterLosses(weight, top_k, config.router_z_loss), output_index_by_router, notes


def _first_setting(meta_model: nn.Module, text_config: Any, names: tuple[str, ...]) -> Any:
    """The value of the first of `names` that the model has as an attribute, else that `text_config` has; None if neither."""
    for owner in (meta_model, text_config):
        for name in names:
            setting = getattr(owner, name, None)
            if setting is not None:
                return setting
    return None


def _refuse_router_settings(config: ModelConfig, reason: str) -> None:
    """Raise ConfigError, with `reason`, if a loss for routers is set to a weight other than 0."""
    for setting, weight in (("router_aux_loss", config.router_aux_loss), ("router_z_loss", config.router_z_loss)):
        if weight:
            raise ConfigError(f"model.{setting}={weight:g}: {reason}; leave it out")


def logit_z_weight(hf_config: Any) -> float:
    """Weight of the z-loss of the output's logits, where the model's class adds one (Bamba's); else 0."""
    return float(getattr(text_model_config(hf_config), "z_loss_coefficient", None) or 0.0)


def _balance_loss_difference(meta_model: nn.Module, top_k: int) -> str | None:
    """How transformers' balancing loss for a model class differs from the one here, as text for "has ..."; None if it does not.

    Both are computed for a few random logits of two routers. `top_k`: experts that a token counts for.
    """
    balance_loss = getattr(sys.modules[type(meta_model).__module__], BALANCE_LOSS_FUNCTION_NAME, None)
    if balance_loss is None:
        return "no balancing loss in transformers"
    generator = torch.Generator().manual_seed(0)
    num_experts = top_k + 3
    logits = [torch.randn(6, num_experts, generator=generator) for _ in range(2)]
    # The last token is padding: a class that counts it computes another loss.
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    record = RoutingRecord(mask, logits=logits)
    losses = RouterLosses(balance_weight=1.0, top_k=top_k)
    expected = losses.terms(record, losses.tokens_by_expert(record), num_tokens=int(mask.sum()))[ADDED_LOSS]
    another_loss = "a balancing loss of its own in transformers, which is not computed here"
    try:
        loss_of_class = balance_loss(tuple(logits), num_experts, top_k, mask)
    except (TypeError, ValueError, RuntimeError, IndexError):  # it takes other arguments
        return another_loss
    if torch.is_tensor(loss_of_class) and torch.allclose(loss_of_class.float(), expected, rtol=1e-5):
        return None
    return another_loss

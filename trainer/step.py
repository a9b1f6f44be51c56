"""`TrainStep`, the root module that strategies shard (a model and an objective), and `BuiltModel`, which describes it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from strategies.base import StepPlan
from trainer.data.batches.collate import Collator
from trainer.data.config import Layout
from trainer.data.objective_spec import DataSpec
from trainer.model.architecture import KEY_SELECTOR_CLASSES
from trainer.model.encoder_decoder import EncoderDecoder
from trainer.model.layout import AttentionLayout
from trainer.model.noise import add_embedding_noise
from trainer.model.quantisation import QuantisationScheme
from trainer.model.weights import BaseWeights, tied_names
from trainer.objectives.base import Objective
from trainer.objectives.routed import AddedLosses
from trainer.tuning.base import Tuning
from trainer.tuning.merged_adapters import MergedAdapters


class TrainStep(nn.Module):
    """`forward(batch)` returns {term: sum over the micro-batch}, on this rank's device.

    Parameters are used only inside the forward passes of the modules that own them: engines gather them there and nowhere else.
    """

    def __init__(
        self, model: nn.Module, objective: Objective, block_classes: set[str], teacher: nn.Module | None = None
    ) -> None:
        """`objective`: computes the terms from `model` and a batch. `block_classes`: names of the classes of repeated layers."""
        super().__init__()
        self.model = model
        self.teacher = teacher
        """A frozen model that the objective compares with: sharded beside the other, and in no checkpoint or export."""
        self.reward_models = nn.ModuleDict()
        """Frozen models that score written answers between two steps, by the name of the reward; likewise."""
        self.objective = objective
        self.plan = StepPlan(gathered_as_one=KEY_SELECTOR_CLASSES)
        """What the run decides for the engine while it is assembled."""
        self.added_losses: AddedLosses | None = None
        """Losses of routers and logits, and the count of tokens by expert; None for a model without any of them."""
        self.neftune_alpha = 0.0
        """Size of the noise on embeddings in training (`trainer/model/noise.py`); 0 adds none."""
        self._block_classes = block_classes

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        with add_embedding_noise(self.model, batch, self.neftune_alpha):
            return self._forward(batch)

    def _forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """The objective's terms for one micro-batch, {name: sum over it}, with the losses of routers if there are any."""
        if self.added_losses is None:
            return self.objective.terms(self.model, batch)
        # The pass before a step's first backward pass that only counts what the routers choose (`objectives/step_totals.py`).
        if "only_count_tokens_by_expert" in batch:
            return self.added_losses.count_tokens_by_expert(self.model, batch)
        return self.added_losses.with_added_terms(self.model, lambda: self.objective.terms(self.model, batch), batch)

    def add_block_classes(self, classes: set[str]) -> None:
        """Add classes of repeated blocks, by name: the teacher's, which may be another architecture."""
        self._block_classes = self._block_classes | classes

    def add_reward_model(self, name: str, model: nn.Module, block_classes: set[str]) -> None:
        """Add a frozen model that scores answers. Its blocks, and what is left of it, are gathered as units of their own."""
        self.reward_models[name] = model
        self.plan.further_units += [*outermost_blocks(model, block_classes), model]

    def shard_units(self) -> list[nn.Module]:
        """The blocks that an engine shards and gathers one at a time: the architecture's repeated layers, in forward order.

        Outermost blocks only, and none of a reward model, which has units of its own. A block that shares a parameter with a
        module outside it is left out: embeddings that the head is tied to, or a block that several layers use. Such a parameter
        can be sharded only once, with the root module.
        """
        of_reward_models = {id(part) for part in self.reward_models.modules()}
        blocks = [block for block in outermost_blocks(self, self._block_classes) if id(block) not in of_reward_models]
        num_modules_of_whole_model = _num_modules_by_parameter(self)
        return [block for block in blocks if _keeps_parameters_to_itself(block, num_modules_of_whole_model)]


def outermost_blocks(module: nn.Module, class_names: set[str]) -> list[nn.Module]:
    """Find the repeated layers of a model, which are sharded as units: modules of these classes inside no other of them.

    `class_names`: such as {"LlamaDecoderLayer"}. In the order of the model.
    """
    blocks: list[nn.Module] = []
    inside_blocks: set[int] = set()
    for submodule in module.modules():
        class_name = type(submodule).__name__.removeprefix("FSDP")  # FSDP2 renames the classes of what it has sharded
        if id(submodule) not in inside_blocks and class_name in class_names:
            blocks.append(submodule)
            inside_blocks.update(id(inner) for inner in submodule.modules())
    return blocks


def _num_modules_by_parameter(module: nn.Module) -> Counter[int]:
    """How many modules in `module` hold each parameter, by the `id()` of the parameter: 2 for an embedding tied to the head."""
    return Counter(id(parameter) for _, parameter in module.named_parameters(remove_duplicate=False))


def _keeps_parameters_to_itself(block: nn.Module, num_modules_of_whole_model: Counter[int]) -> bool:
    """Whether no module outside `block` holds one of its parameters, as tied embeddings do: then it can be sharded by itself.

    `num_modules_of_whole_model`: by the `id()` of a parameter, how many modules of the whole model hold it.
    """
    num_modules_in_block = _num_modules_by_parameter(block)
    return all(
        count == num_modules_of_whole_model[parameter_id] for parameter_id, count in num_modules_in_block.items()
    )


class ExpectedBytes(NamedTuple):
    """Estimated memory of one rank in bytes."""

    model_state: float
    """Parameters, gradients and optimizer state."""
    activations: float
    """Peak of the longest micro-batch."""


@dataclass(slots=True)
class BuiltModel:
    """The architecture of a run, on the meta device, tuned but not sharded.

    A base name is the name of a parameter in the base model, without what a tuning method wraps around its module.
    """

    step_module: TrainStep
    tuning: Tuning
    """The tuning method, applied to the model of `step_module`."""
    data_spec: DataSpec
    """How the objective reads data."""
    collator: Collator
    """What makes micro-batches in this layout."""
    attention_layout: AttentionLayout
    """How documents lie in a row, and the attention kernel."""
    new_token_ids: list[int]
    """Ids of the tokens that the run adds to the vocabulary."""
    vocabulary_parameters: frozenset[str]
    """Base names of the parameters that have a row for each token."""
    base_on_meta: Any
    """The base model as transformers builds it, without added modules or values: checkpoints are read by its names and shapes."""
    head_prefixes: tuple[str, ...]
    """Top-level names of a head that the checkpoint need not have (classification)."""
    config: Any
    """The transformers config of the model."""
    base_config: Any = None
    """The transformers config of the base with the run's positions, which an adapter needs; None if no setting changes them."""
    encoder_decoder: EncoderDecoder | None = None
    """Set for encoder-decoder models trained as such."""
    scheme: QuantisationScheme | None = None
    """How the weights in `quantised_shapes` are stored."""
    quantised_shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Shapes of the weights that are stored packed, by base name."""
    zero_row_by_name: dict[str, int] = field(default_factory=dict)
    """The row that stays zero, by base name."""
    activation_bytes: float | None = None
    """Bytes that the longest micro-batch holds at its peak on one rank; None if they were not counted."""
    expected_bytes: ExpectedBytes | None = None
    """Memory of one rank, as estimated before there are weights."""
    merged_adapters: MergedAdapters | None = None
    """Adapters that are merged into the base as it is loaded."""

    @property
    def layout(self) -> Layout:
        """How documents lie in a row."""
        return self.attention_layout.layout

    @property
    def attention(self) -> str:
        """transformers' name of the attention kernel."""
        return self.attention_layout.attention

    @property
    def substitutions(self) -> dict[str, str]:
        """What was chosen for the user, and why; grows while the run is built."""
        return self.attention_layout.notes

    def set_total_steps(self, total_steps: int) -> None:
        """Tell a tuning method whose parameters change with the step, such as AdaLoRA, how many steps the run has in all."""
        if self.step_module.plan.optimizer_hooks is not None:
            self.step_module.plan.optimizer_hooks.begin(total_steps)

    def base_weights(self, directory: Path) -> BaseWeights:
        """The reader of the base model's values as the run trains on them, from the model files in `directory`.

        It merges the adapters of `model.adapters` into them, and packs those that are stored quantised.
        """
        return BaseWeights(
            directory,
            self.base_on_meta,
            tied_names(self.step_module.model, self.tuning.base_name),
            merged_adapters=self.merged_adapters,
            scheme=self.scheme,
            quantised=self.quantised_shapes,
        )

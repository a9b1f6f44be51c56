"""The root module that strategies shard: a model and an objective, from batch to summed terms; and what is known of it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from strategies.base import ActivationCheckpointing, AroundUpdate
from trainer.data.batches.collate import Collator
from trainer.data.config import Layout
from trainer.data.objective_spec import Reading
from trainer.model.architecture import CHOOSERS
from trainer.model.encoder_decoder import EncoderDecoder
from trainer.model.layout import Arrangement
from trainer.model.noise import noise
from trainer.model.quantisation import Scheme
from trainer.model.weights import BaseWeights, tied_names
from trainer.objectives.base import Objective
from trainer.objectives.routed import Routed
from trainer.tuning.base import Tuning
from trainer.tuning.merged_adapters import Folded


class TrainStep(nn.Module):
    """`forward(batch)` returns {term: sum over the micro-batch}. Parameters are touched only in modules' own forwards."""

    def __init__(
        self, model: nn.Module, objective: Objective, block_classes: set[str], teacher: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.teacher = teacher
        """A frozen model that the objective compares with: sharded beside the other, and in no checkpoint or export."""
        self.objective = objective
        self._block_classes = block_classes
        self.checkpointing: list[ActivationCheckpointing] | None = None
        """What each block recomputes, where that was planned."""
        self.defer_sync: bool | None = None
        """Whether gradients wait whole for the last micro-batch of a step, where that was planned."""
        self.routed: Routed | None = None
        """What is asked of routers, experts and logits, where the model has such."""
        self.gathered_whole: frozenset[str] = CHOOSERS
        """Classes of modules whose parts are gathered with them, not each for its own call."""
        self.neftune_alpha = 0.0
        """Size of the noise on embeddings in training (`trainer/model/noise.py`)."""
        self.ema_decay = 0.0
        """Decay of the average of the weights that evaluations and exports take; 0: they take the weights themselves."""
        self.around_update: AroundUpdate | None = None
        """What the tuning method does around each optimizer step, where it does anything."""

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        with noise(self.model, batch, self.neftune_alpha):
            return self._forward(batch)

    def _forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        seen = self.routed
        if seen is None:
            return self.objective.terms(self.model, batch)
        if "choices_alone" in batch:
            return seen.choices(self.model, batch)
        return seen.terms(self.model, lambda: self.objective.terms(self.model, batch), batch)

    def add_block_classes(self, classes: set[str]) -> None:
        """Further classes of repeated blocks: the teacher's."""
        self._block_classes = self._block_classes | classes

    def shard_units(self) -> list[nn.Module]:
        """The architecture's repeated blocks, in forward order; outermost only.

        Not among them are those that share a parameter with what is outside (embeddings that the head is tied to, a block
        that several layers use): it can be sharded once only, with the whole.
        """
        found: list[nn.Module] = []
        inside: set[int] = set()
        for module in self.modules():
            name = type(module).__name__.removeprefix("FSDP")  # FSDP2 renames the classes of what it has sharded
            if id(module) not in inside and name in self._block_classes:
                found.append(module)
                inside.update(id(m) for m in module.modules())
        uses = Counter(id(p) for _, p in self.named_parameters(remove_duplicate=False))
        return [block for block in found if all(n == uses[p] for p, n in _uses(block).items())]


def _uses(block: nn.Module) -> Counter[int]:
    return Counter(id(p) for _, p in block.named_parameters(remove_duplicate=False))


@dataclass(slots=True)
class Built:
    """The architecture of a run, on the meta device, tuned but not sharded."""

    step_module: TrainStep
    tuning: Tuning
    reading: Reading
    """How the objective reads data."""
    collator: Collator
    """What makes micro-batches in this layout."""
    arrangement: Arrangement
    """How documents lie in a row, and the attention kernel."""
    new_token_ids: list[int]
    vocabulary: frozenset[str]
    """Base names of the parameters that have a row for each token."""
    plain: Any
    """The architecture as transformers builds it, on meta and untouched: what checkpoints are read into."""
    head_prefixes: tuple[str, ...]
    """Top-level names of a head that the checkpoint need not have (classification)."""
    config: Any
    """The transformers config of the model."""
    two_sides: EncoderDecoder | None = None
    """Set for encoder-decoder models trained as such."""
    scheme: Scheme | None = None
    """How the weights in `quantised` are stored."""
    quantised: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Shapes of the weights that are stored packed, by base name."""
    zeroed: dict[str, int] = field(default_factory=dict)
    """The row that stays zero, by base name."""
    activations: float | None = None
    """Bytes that the longest micro-batch holds at its peak on one rank, where they were counted."""
    expected: tuple[float, float] | None = None
    """(model state, activations) in bytes on one rank, as estimated before there are weights."""
    folded: Folded | None = None
    """Adapters that are folded into the base as it is loaded."""

    @property
    def layout(self) -> Layout:
        """How documents lie in a row."""
        return self.arrangement.layout

    @property
    def attention(self) -> str:
        """transformers' name of the attention kernel."""
        return self.arrangement.attention

    @property
    def substitutions(self) -> dict[str, str]:
        """What was chosen for the user, and why; grows while the run is built."""
        return self.arrangement.notes

    def base_weights(self, directory: Path) -> BaseWeights:
        """The values of the base as it is trained on, read from the model in `directory`."""
        return BaseWeights(
            directory,
            self.plain,
            tied_names(self.step_module.model, self.tuning.base_name),
            folded=self.folded,
            scheme=self.scheme,
            quantised=self.quantised,
        )

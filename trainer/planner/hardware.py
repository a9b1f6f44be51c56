"""A GPU that a plan is made for: memory, speeds and price, from `conf/hardware/<card>.yaml`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from strategies.base import Precision
from strategies.hardware import Gpu, best_precision
from trainer.planner.cost_model import Form, Taken
from trainer.planner.depth_extrapolation import Extended
from trainer.reporting.gpu_peaks import peak_tflops

GIB = 2**30
CARDS = Path(__file__).resolve().parents[2] / "conf" / "hardware"
CONTEXT_GIB = 0.75
"""GiB that a process takes on a card before its first tensor: driver, kernels, libraries' workspaces. An allowance."""
GROUP_GIB = 0.4
"""GiB that NCCL takes for each group of ranks with its channels of a few MiB (NCCL_BUFFSIZE is 4 MiB). An allowance."""
ALLOCATOR = 0.05
"""Share of what is allocated that torch's allocator reserves beyond it, its blocks being pieces of segments. An allowance."""
PROCESS_GIB = 3.0
"""GiB of host memory of a rank with its libraries. An allowance."""


@dataclass(kw_only=True, slots=True)
class Card:
    """What is known of a card. Rates are in 10^9 bytes a second and one way."""

    name: str = ""
    """Its driver's name, under which `trainer/reporting/gpu_peaks.py` has its speed in bf16 (fp16 before Ampere)."""
    capability: list[int] = field(default_factory=list)
    """CUDA capability, as in [9,0]."""
    architecture: str | None = None
    """AMD's name of the architecture, such as gfx942; null on NVIDIA's."""
    memory_gib: float = 0.0
    """Memory in GiB that a program can have, as torch reports it."""
    fp32_tflops: float = 0.0
    """TFLOP/s in fp32, outside matrix units."""
    memory_gb_s: float = 0.0
    """Rate of its memory, GB/s."""
    link_gb_s: float = 0.0
    """Rate between cards of one node, GB/s one way."""
    node_gb_s: float = 0.0
    """Rate between nodes, all cards of a node together, GB/s one way."""
    host_gb_s: float = 0.0
    """Rate between card and host memory, GB/s one way."""
    disk_gb_s: float = 1.0
    """Rate at which one node writes checkpoints, GB/s; an assumption, set it to yours."""
    allocator: float = ALLOCATOR
    """Share of what is allocated that torch's allocator reserves beyond it; an allowance, set it to what you measured."""
    pace: float = 1.0
    """Seconds that a step takes for each that is reckoned; 1 where nothing was measured."""
    tensors: float = 1.0
    """Bytes that tensors take for each that is simulated; 1 where nothing was measured."""
    gpus_per_node: int = 8
    """Cards of a node as it is usually built."""
    price_per_hour: float | None = None
    """US dollars an hour for one card; null where no price was found."""
    sources: list[str] = field(default_factory=list)
    """Where the figures are from."""
    date: str = ""
    """When they were looked up, year and month."""

    def gpu(self) -> Gpu:
        """The card as code that chooses by capability sees it."""
        return Gpu(self.name, (self.capability[0], self.capability[1]), self.architecture)

    def precision(self, asked: Precision) -> Precision:
        """What `auto` becomes on it."""
        return best_precision(self.gpu()) if asked is Precision.auto else asked

    def tflops(self, precision: Precision) -> float:
        """Peak TFLOP/s of dense products; 0 where it is not known."""
        if precision is Precision.fp32:
            return self.fp32_tflops
        if precision is Precision.bf16 and not self.gpu().has_bf16:
            return self.fp32_tflops  # emulated
        return peak_tflops(self.name) or 0.0


def card_named(name: str) -> Card | None:
    """The card of `conf/hardware/` whose driver calls itself so; None where there is none, or none whose speed is known."""
    from omegaconf import OmegaConf

    for file in sorted(CARDS.glob("*.yaml")):
        if f"name: {name}\n" in file.read_text(encoding="utf-8"):
            card: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Card), OmegaConf.load(file)))
            assert isinstance(card, Card)
            return card
    return None


@dataclass(frozen=True, slots=True)
class Fit:
    """A rank's memory on a card, in bytes."""

    live: int
    """Of tensors, at the peak."""
    context: int
    """Of the process itself and its libraries."""
    allocator: int
    """Reserved beyond what is allocated."""
    exchange: int
    """Of NCCL, for its groups."""
    limit: int
    """Of the card."""

    @property
    def total(self) -> int:
        """All together."""
        return self.live + self.context + self.allocator + self.exchange

    @property
    def margin(self) -> int:
        """What is left; negative where it is too much."""
        return self.limit - self.total


def fit(form: Form, taken: Taken, card: Card) -> Fit:
    """How a peak lies in the card's memory, with what is taken beside tensors."""
    return fit_of(round(card.tensors * taken.total), groups_of(form), card.memory_gib, card.allocator)


def fit_of(live: int, groups: int, memory_gib: float, allocator: float = ALLOCATOR) -> Fit:
    """How `live` bytes of tensors lie in so much memory, beside what the process and its groups of ranks take."""
    return Fit(
        live=live,
        context=round(CONTEXT_GIB * GIB),
        allocator=round(allocator * live),
        exchange=round(GROUP_GIB * GIB * groups),
        limit=round(memory_gib * GIB),
    )


def room(form: Form, card: Card) -> float:
    """Bytes of tensors that the card has room for."""
    beside = CONTEXT_GIB + GROUP_GIB * groups_of(form)
    return max(0.0, (card.memory_gib - beside) * GIB / (1 + card.allocator) / card.tensors)


def groups_of(form: Form | Extended) -> int:
    """How many groups of ranks exchange something in a step."""
    return len({key[1] for key in form.exchanged if key[1] > 1})


def host_gib(form: Form, ranks: int) -> float:
    """GiB of a node's memory with so many ranks: what is offloaded, and the processes."""
    return ranks * (form.host / GIB + PROCESS_GIB)

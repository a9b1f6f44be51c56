"""A GPU that a plan is made for: memory, speeds and price, from `conf/hardware/<card>.yaml`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from strategies.base import Precision
from strategies.hardware import Gpu, best_precision
from strategies.pinned_memory import PROCESS_GIB
from trainer.planner.cost_model import ALL_TO_ALL, CostModel, MemoryPeak
from trainer.planner.depth_extrapolation import ExtrapolatedStep
from trainer.reporting.gpu_peaks import peak_tflops

GIB = 2**30
CARDS_DIR = Path(__file__).resolve().parents[2] / "conf" / "hardware"
PROCESS_CONTEXT_GIB = 0.75
"""GiB that a process takes on a card before its first tensor: driver, kernels, libraries' workspaces. An allowance."""
NCCL_GROUP_GIB = 0.4
"""GiB that NCCL takes for each group of ranks with its channels of a few MiB (NCCL_BUFFSIZE is 4 MiB). An allowance."""
ALLOCATOR_OVERHEAD = 0.05
"""Share of what is allocated that torch's allocator reserves beyond it, its blocks being pieces of segments. An allowance."""


@dataclass(kw_only=True, slots=True)
class Card:
    """A GPU model that a plan is made for: memory, rates and price, as its file in `conf/hardware/` has them.

    A step takes as long as its FLOPs, its memory traffic and its exposed communication at these rates (`speed.py`). Rates are in
    10^9 bytes a second and one way. `pace`, `writing_pace` and `tensors` correct estimates by what a run has measured.
    """

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
    allocator: float = ALLOCATOR_OVERHEAD
    """Share of what is allocated that torch's allocator reserves beyond it; an allowance, set it to what you measured."""
    pace: float = 1.0
    """Seconds that a step takes for each estimated second; 1 where nothing was measured."""
    writing_pace: float = 1.0
    """Seconds that generating a round's answers takes for each estimated second; 1 where nothing was measured."""
    scoring_s: float | None = None
    """Seconds that rewards take for each answer of a round, all ranks together; null where nothing was measured."""
    tensors: float = 1.0
    """Bytes that tensors take for each that is simulated; 1 where nothing was measured."""
    node_memory_gib: float | None = None
    """Memory in GiB of a host with these cards; null where it is not known, and nothing is refused for it."""
    gpus_per_node: int = 8
    """Cards of a node as it is usually built."""
    price_per_hour: float | None = None
    """US dollars an hour for one card; null where no price was found."""
    sources: list[str] = field(default_factory=list)
    """Where the figures are from."""
    date: str = ""
    """When they were looked up, year and month."""

    def gpu(self) -> Gpu:
        """The card as a `Gpu`, by which code chooses that looks at capabilities."""
        return Gpu(self.name, (self.capability[0], self.capability[1]), self.architecture)

    def precision(self, requested: Precision) -> Precision:
        """The precision that `auto` becomes on this card."""
        return best_precision(self.gpu()) if requested is Precision.auto else requested

    def tflops(self, precision: Precision) -> float:
        """Peak TFLOP/s of dense products; 0 where it is not known."""
        if precision is Precision.fp32:
            return self.fp32_tflops
        if precision is Precision.bf16 and not self.gpu().has_bf16:
            return self.fp32_tflops  # emulated
        return peak_tflops(self.name) or 0.0


def find_card(name: str) -> Card | None:
    """Look up the rates and the price of a GPU by its driver's name, such as `NVIDIA A100-SXM4-80GB`; None if not known.

    They are in files of `conf/hardware/`.
    """
    from omegaconf import OmegaConf

    for file in sorted(CARDS_DIR.glob("*.yaml")):
        # Searched as text, because to load every file takes long.
        if f"name: {name}\n" in file.read_text(encoding="utf-8"):
            card: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Card), OmegaConf.load(file)))
            assert isinstance(card, Card)
            return card
    return None


@dataclass(frozen=True, slots=True)
class MemoryFit:
    """A rank's memory on a card, in bytes."""

    live_bytes: int
    """Bytes of tensors at the peak."""
    process_bytes: int
    """Bytes of the process itself and its libraries."""
    allocator_bytes: int
    """Bytes that the allocator reserves beyond what is allocated."""
    nccl_bytes: int
    """Bytes of NCCL's buffers for groups of ranks."""
    device_bytes: int
    """Memory of the card."""

    @property
    def needed_bytes(self) -> int:
        """Bytes that the run needs."""
        return self.live_bytes + self.process_bytes + self.allocator_bytes + self.nccl_bytes

    @property
    def margin_bytes(self) -> int:
        """Bytes that are left; negative if the run needs too much."""
        return self.device_bytes - self.needed_bytes


def card_memory_fit(cost_model: CostModel, peak: MemoryPeak, card: Card) -> MemoryFit:
    """How a peak fits in the card's memory, with what the process takes beside tensors."""
    return device_memory_fit(
        round(card.tensors * peak.total_bytes), num_rank_groups(cost_model), card.memory_gib, card.allocator
    )


def device_memory_fit(
    live_bytes: int, num_groups: int, memory_gib: float, allocator_overhead: float = ALLOCATOR_OVERHEAD
) -> MemoryFit:
    """Compare what a rank needs with the memory of its device: tensors, and what the process itself takes beside them.

    `live_bytes`: of tensors at the peak. `num_groups`: groups of ranks that exchange something, for each of which NCCL takes
    buffers. `memory_gib`: of the device. `allocator_overhead`: the share of live bytes that torch's allocator reserves beyond
    them.
    """
    return MemoryFit(
        live_bytes=live_bytes,
        process_bytes=round(PROCESS_CONTEXT_GIB * GIB),
        allocator_bytes=round(allocator_overhead * live_bytes),
        nccl_bytes=round(NCCL_GROUP_GIB * GIB * num_groups),
        device_bytes=round(memory_gib * GIB),
    )


def available_tensor_bytes(cost_model: CostModel, card: Card) -> float:
    """Bytes of tensors, as a simulation counts them, for which the card has memory: the inverse of `card_memory_fit`.

    What the process itself takes, NCCL and the allocator's overhead are subtracted. At least 0.
    """
    other_gib = PROCESS_CONTEXT_GIB + NCCL_GROUP_GIB * num_rank_groups(cost_model)
    # The allocator reserves more than tensors take, and real tensors may take more than simulated ones (`card.tensors`).
    tensor_bytes = (card.memory_gib - other_gib) * GIB / (1 + card.allocator) / card.tensors
    return max(0.0, tensor_bytes)


def num_rank_groups(cost_model: CostModel | ExtrapolatedStep) -> int:
    """Count the groups of ranks that exchange something in a simulated step, since NCCL takes device memory for each.

    Groups are told apart by their size, and by whether they exchange tokens (rows for attention heads, or for experts).
    """
    groups = set()
    for collective in cost_model.collective_totals:
        # A group that shares rows or experts is another one than the group of as many ranks that shares weights.
        is_token_all_to_all = collective.name.startswith(ALL_TO_ALL)
        if collective.num_ranks > 1:
            groups.add((collective.num_ranks, is_token_all_to_all))
    # A cost model has its all-to-alls of tokens apart, one for each group; an extrapolated step has them in `collective_totals`.
    num_token_groups = len(cost_model.token_all_to_alls) if isinstance(cost_model, CostModel) else 0
    return len(groups) + num_token_groups


def needed_host_gib(cost_model: CostModel, ranks: int, num_rows_or_tokens: float) -> float:
    """GiB that `ranks` ranks need of their node's memory: what is offloaded in micro-batches of this size, and the processes."""
    offloaded_bytes = cost_model.host_bytes + cost_model.pinned_bytes(num_rows_or_tokens)
    return ranks * (offloaded_bytes / GIB + PROCESS_GIB)


def available_input_bytes(cost_model: CostModel, ranks: int, node_gib: float) -> float:
    """Bytes of pinned memory that each of `ranks` ranks may take for inputs of blocks, on a host of `node_gib` GiB."""
    return max(0.0, (node_gib / ranks - PROCESS_GIB) * GIB - cost_model.host_bytes)

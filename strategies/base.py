"""What a strategy is: the typed settings, the interface, and the loss contract every strategy keeps.

The loss contract
-----------------
Every strategy averages gradients over the data-parallel ranks. The trainer therefore hands `Engine.backward` the value

    sum over the micro-batch / count over the whole optimizer step * dp_size

for each term of the objective, so that the gradient of an optimizer step is the gradient of
`sum over the global batch / count over the global batch`, whatever the number of ranks, the micro-batch or the
accumulation. Counts are known before the first backward and need no communication. Where tokens have weights, the sum
is one of weighted losses and the count is the sum of the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from strategies.settings import DESCRIBES, Reach, number, setting

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from strategies.host_memory import HostMemory
    from strategies.saving import RankState


class StrategyName(StrEnum):
    """The names users type as `strategy=<name>`; `auto` stands for one of those of `strategies/registry.py`."""

    auto = "auto"
    single = "single"
    ddp = "ddp"
    fsdp2 = "fsdp2"
    hsdp = "hsdp"
    zero1 = "zero1"
    zero2 = "zero2"
    zero3 = "zero3"


class Precision(StrEnum):
    """Arithmetic of the run. `auto` is resolved from the device before the config is frozen."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class ActivationCheckpointing(StrEnum):
    """What the backward pass recomputes: nothing, every block, or all but the costly matrix products; `auto` plans it."""

    auto = "auto"
    none = "none"
    full = "full"
    selective = "selective"


@dataclass(kw_only=True, slots=True)
class StrategyConfig:
    """Settings every strategy understands."""

    name: StrategyName = setting(StrategyName.single, reach=DESCRIBES)
    """Which strategy runs; set by the group choice `strategy=<name>`, not by hand."""
    activation_checkpointing: ActivationCheckpointing = setting(ActivationCheckpointing.none, reach=DESCRIBES)
    """Recompute in the backward pass: `none`, `selective` (keeps matrix products), `full`, or `auto`, as memory asks."""
    memory_gib: float | None = number(None, above=0, advice="null takes what the device has")
    """Memory of one rank in GiB that `activation_checkpointing=auto` and `defer_sync=null` plan for; default: the device's."""
    compile: bool = setting(False, reach=DESCRIBES)
    """Compile each transformer block with `torch.compile`; pays on GPUs, not on CPUs."""
    defer_sync: bool | None = setting(None, reach=DESCRIBES)
    """Reduce gradients on the last micro-batch alone; null: where whole gradients fit (fsdp2, hsdp). ZeRO goes by its stage."""


@dataclass(kw_only=True, slots=True)
class AutoConfig(StrategyConfig):
    """The fastest strategy that fits, chosen by the run at its first start; what is common to all can be set."""

    name: StrategyName = StrategyName.auto


@dataclass(kw_only=True, slots=True)
class SingleConfig(StrategyConfig):
    """One process, no sharding: the oracle the others are compared with."""


@dataclass(kw_only=True, slots=True)
class DdpConfig(StrategyConfig):
    """Replicated parameters, all-reduced gradients."""

    name: StrategyName = StrategyName.ddp
    bucket_mib: int = number(25, least=1, advice="25 (ddp) to 200 (zero) as a rule")
    """Size of one all-reduce bucket in MiB."""


@dataclass(kw_only=True, slots=True)
class Fsdp2Config(StrategyConfig):
    """Parameters, gradients and optimizer state sharded block by block with `fully_shard`."""

    name: StrategyName = StrategyName.fsdp2
    reshard_after_forward: bool = setting(True, reach=DESCRIBES)
    """Free a block's gathered parameters after its forward pass; `false` saves one all-gather and costs memory."""
    cpu_offload: bool = setting(False, reach=DESCRIBES)
    """Keep parameters and optimizer state in host memory and step on the CPU."""
    replicate: int = number(1, least=0, advice="0 means one replica a host, or 2 on one host")
    """Number of replicas (hsdp): shards stay inside a replica. 0 means one replica a host, or 2 on a single host."""


@dataclass(kw_only=True, slots=True)
class ZeroConfig(StrategyConfig):
    """DeepSpeed ZeRO: 1 shards optimizer state, 2 also gradients, 3 also parameters."""

    name: StrategyName = StrategyName.zero2
    stage: int = number(2, least=1, most=3, advice="chosen with strategy=zero1, zero2 or zero3")
    """ZeRO stage: 1, 2 or 3; set by the group choice."""
    offload_optimizer: str = setting("none", reach=DESCRIBES)
    """Where optimizer state lives: `none` (device), `cpu` or `nvme` (needs libaio and a C++ compiler)."""
    offload_parameters: str = setting("none", reach=DESCRIBES)
    """Where idle parameters live (stage 3 only): `none`, `cpu` or `nvme`."""
    nvme_path: str | None = setting(None, reach=Reach.place)
    """Directory on a local NVMe drive, needed by either `nvme` choice."""
    bucket_mib: int | None = number(None, least=1, advice="25 (ddp) to 200 (zero) as a rule")
    """Size of one reduce or all-gather bucket in MiB; none: 200 on GPUs, 8 on CPUs."""
    persistence_threshold: int = number(100_000, least=0, advice="0 shards every parameter")
    """Parameters with fewer elements than this stay gathered (stage 3)."""
    prefetch_mib: int = number(50, least=0, advice="0 gathers nothing ahead")
    """Parameters gathered ahead of use in MiB (stage 3)."""


UpdateFilter = Callable[["Tensor"], "Tensor"]
"""Takes the gradients' global norm before clipping (0-d, on the device) and returns whether the update is left out: a 0-d bool
tensor on the same device, equal on all ranks. May communicate: all ranks call it, at most once a step, and alike."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one optimizer step reports. Tensors stay on the device; reading them is the caller's choice of a sync."""

    grad_norm: Tensor
    """Global L2 norm of the gradients before clipping, a 0-d float32 tensor, equal on all ranks."""
    skipped: Tensor
    """0-d float32 tensor, 1 where the update was left out, since the gradients were not finite or the filter said so; equal
    on all ranks."""


class ParameterSource(Protocol):
    """Where initial parameter values come from. No call communicates: ranks may ask for different runs."""

    def run(self, name: str, shape: torch.Size, start: int, stop: int) -> Tensor:
        """Elements `[start, stop)` of the flattened full parameter `name`, on the CPU."""


@dataclass(slots=True)
class StepPlan:
    """What a run has decided about its training step and no setting of the strategy says. Engines read it in `prepare`."""

    recomputation: list[ActivationCheckpointing] | None = None
    """What the backward pass recomputes, for each block in the order of `shard_units`.

    None: `strategy.activation_checkpointing` holds for all of them.
    """
    defer_sync: bool | None = None
    """Whether ranks reduce gradients on the last micro-batch of a step alone. None: `strategy.defer_sync` says so."""
    gathered_as_one: frozenset[str] = frozenset()
    """Classes of modules that are gathered with all their parts, since their forward pass reaches into these."""
    ema_decay: float = 0.0
    """Decay of the moving average of the weights that evaluations and exports take; 0: they take the weights themselves."""
    optimizer_hooks: OptimizerStepHooks | None = None
    """What the tuning method does around each optimizer step; None if it does nothing."""


def plan_of(step_module: nn.Module) -> StepPlan:
    """The plan that a step module carries."""
    return cast(StepModule, step_module).plan


class StepModule(Protocol):
    """What a strategy shards: one root module whose forward takes a batch and returns the summed terms."""

    plan: StepPlan

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]: ...
    def shard_units(self) -> list[nn.Module]:
        """The repeated blocks, in forward order, that are gathered one at a time."""


class OptimizerStepHooks(Protocol):
    """What a tuning method does around each optimizer step, on parameters and gradients that are whole on every rank.

    They stand in the step module's plan. Engines that shard cannot keep them: such a run is refused when it is composed.
    No call communicates; all ranks do the same.
    """

    def begin(self, total_steps: int) -> None:
        """The run takes `total_steps` optimizer steps, those before a resumed checkpoint included."""

    def before_clip(self, scale: Tensor | None) -> None:
        """Gradients are reduced, and not yet clipped; `scale` is the factor on the loss, where it has one (fp16)."""

    def after_update(self, step: int, *, finite: bool) -> None:
        """Optimizer step `step`, counted from 1, is done (where not `finite`, skipped); clipped gradients are still there."""

    def state_of(self, name: str) -> dict[str, Tensor]:
        """What belongs to the parameter `name` beside its moments: live, contiguous, of its shape; always the same keys."""

    def restored(self) -> None:
        """The tensors of `state_of` were overwritten by those of a checkpoint."""


OptimizerFactory = Callable[[Iterable[tuple[str, "nn.Parameter"]]], "torch.optim.Optimizer"]
"""Builds the optimizer from the trainable (plain name, parameter) pairs, after sharding."""


PROGRESS_KEYS = {"recent_steps": "recent", "skipped_samples": "passed"}
"""Keys in `progress.json` and `run.json` of the fields of `Progress` that have another name there."""


@dataclass(kw_only=True, slots=True)
class Progress:
    """How far a run is. `samples` and `skipped_samples` are the whole state of the data order."""

    step: int = 0
    """Optimizer steps taken."""
    samples: int = 0
    """Documents (packs) consumed since the start of the run, without those that are skipped."""
    tokens: int = 0
    """Tokens consumed, all ranks together."""
    supervised_tokens: int = 0
    """Supervised tokens consumed, all ranks together."""
    best_metric: float | None = None
    """Best value so far of the metric that evaluation watches."""
    best_step: int | None = None
    """Step at which `best_metric` was reached."""
    stale_evaluations: int = 0
    """Evaluations since the best one, for early stopping."""
    owes_evaluation: bool = False
    """Whether the evaluation that was due at this step was broken off, and is to be made up before the next step."""
    skipped_steps: int = 0
    """Steps whose update was left out, because a gradient was not finite or the step stood out."""
    outliers: int = 0
    """Steps whose loss or gradient norm stood out."""
    recent_steps: list[dict[str, float]] = field(default_factory=list)
    """Loss and gradient norm of the last steps, with which the anomaly guards compare the next ones."""
    rollbacks: int = 0
    """Times that the run went back to a checkpoint, since a step stood out."""
    skipped_samples: list[dict[str, int]] = field(default_factory=list)
    """Ranges of the sample order that rollbacks left out, since a step on them stood out: `first` position and `count`."""
    evaluations: list[dict[str, float]] = field(default_factory=list)
    """`step`, `train` and `held_out` loss of each evaluation, by which overfitting is told."""
    interval_loss: float = 0.0
    """Sum of the training losses of the steps since the last evaluation."""
    interval_steps: int = 0
    """Number of these steps."""
    first_loss: float | None = None
    """Training loss of step 1, before any update, with which the last steps are compared; None of runs that did not note it."""
    recent_losses: list[dict[str, float]] = field(default_factory=list)
    """`loss` of each of the last steps, the newest last."""
    wandb_id: str | None = None
    """The W&B run that a resumed run continues."""

    def as_json(self) -> dict[str, Any]:
        """The fields under their keys in `progress.json` and `run.json`."""
        return {PROGRESS_KEYS.get(name, name): content for name, content in asdict(self).items()}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Progress:
        """The progress whose `as_json` is `content`."""
        names = {key: name for name, key in PROGRESS_KEYS.items()}
        return cls(**{names.get(key, key): value for key, value in content.items()})


class FullParameters:
    """Every rank holds every parameter anyway: nothing to gather."""

    sharded = False
    """Whether parameters are sharded."""

    def gather_bytes(self) -> int | None:
        """What gathering them takes on this rank's device beside what it holds; None where it cannot be done."""
        return 0

    def gathered(self) -> AbstractContextManager[None]:
        """Parameters whole on every rank while entered: forward passes without gradients then need no other rank.

        All ranks enter and leave, and take no optimizer step meanwhile.
        """
        return nullcontext()


class Engine(Protocol):
    """A live, sharded training step; one a run."""

    dp_rank: int
    dp_size: int
    step_module: nn.Module
    """The step module, sharded; its parameters are this rank's part."""
    host_memory: HostMemory | None
    """Through which the ranks exchange parameters and gradients, where they do not through their process group."""
    full_parameters: FullParameters
    """How parameters are made whole on every rank, for many forward passes in `inference`."""

    def forward(self, batch: dict[str, Any], *, last: bool) -> dict[str, Tensor]:
        """Run the sharded step module; returns {term: sum over the micro-batch}. All ranks must call.

        `last` marks the last micro-batch of the step: some engines decide in the forward pass whether to synchronise.
        """

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate gradients; `last` marks the last micro-batch of the step, which synchronises. All ranks must call."""

    def step(self, lr_factor: float, update_filter: UpdateFilter | None = None) -> StepResult:
        """Clip, update and zero. Each parameter group's own base rate is multiplied by `lr_factor`. All ranks must call.

        If gradients are not finite, or `update_filter` says so, weights, moments and what counts updates stay as they are. The
        filter is asked whenever the gradients are finite.
        """

    def inference(self, *, averaged: bool = True) -> AbstractContextManager[nn.Module]:
        """The step module for forward passes without gradients, in eval mode; restores training mode. All ranks enter.

        Where the optimizer averages weights, the average computes; with `averaged=False`, what trains.
        """

    def state(self, progress: Progress) -> RankState:
        """The training state as it is now, to be written at once or after it was copied. All ranks must call.

        Its tensors are live: it is to be written, or copied, before the next step.
        """

    def load(self, path: Path) -> Progress:
        """Read the training state written by any strategy at any world size, between two steps. All ranks must call.

        Raises, on every rank, StorageError for files that cannot be used, ConfigError for the state of another kind of run.
        """

    def gather(self, *, trainable_only: bool) -> Iterator[tuple[str, Tensor | None]]:
        """Full parameters one by one, on the CPU, under plain names; None on all ranks but 0. All ranks must exhaust it."""

    def close(self) -> None:
        """Give up the memory of gradients and optimizer state, and of all else once nobody refers to it: it is used no more.

        No collective.
        """


class Strategy(Protocol):
    """Builds an engine out of a step module that lives on the meta device."""

    def init_context(self) -> AbstractContextManager[None]:
        """The context in which the architecture is built: parameters on meta, buffers real."""

    def prepare(
        self,
        step_module: nn.Module,
        *,
        source: ParameterSource,
        make_optimizer: OptimizerFactory,
        max_grad_norm: float,
    ) -> Engine:
        """Shard, load the values that this rank holds, then build the optimizer. All ranks must call."""

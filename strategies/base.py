"""What a strategy is: the typed settings, the interface, and the loss contract every strategy keeps.

The loss contract
-----------------
Every strategy averages gradients over the data-parallel ranks. The trainer therefore hands `Engine.backward` the value

    sum over the micro-batch / count over the whole optimizer step * world_size

for each term of the objective, so that the gradient of an optimizer step is the gradient of
`sum over the global batch / count over the global batch`, whatever the number of ranks, the micro-batch or the
accumulation. Counts are known before the first backward and need no communication. Where tokens have weights, the sum
is one of weighted losses and the count is the sum of the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from strategies.settings import DESCRIBES, Reach, number, setting

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from strategies.host_inputs import HostInputs
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


class InferenceWeights(StrEnum):
    """Which weights are in place for forward passes without gradients (`Engine.inference`)."""

    averaged = "averaged"
    """The average of the trained weights over steps, if the run keeps one, else the trained weights."""
    trained = "trained"
    initial = "initial"
    """Those that the run began with. The engine has them if the plan says `keeps_initial_weights`."""


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
    """What the backward pass recomputes: `none`; `selective` (keeps matrix products); `full` (whole blocks); or `auto`, by the
    memory that is available."""
    memory_gib: float | None = number(None, above=0, advice="null takes what the device has")
    """Memory of one rank in GiB that `activation_checkpointing=auto` and `defer_sync=null` plan with. null: that of the
    device."""
    compile: bool = setting(False, reach=DESCRIBES)
    """Compile each transformer block with `torch.compile`. It is faster on GPUs, not on CPUs."""
    mlp_tokens: int | None = number(
        None, least=1, advice="8192 keeps the products large; null takes all tokens at once"
    )
    """Number of tokens that the MLP of a block computes at a time; each tile is recomputed in the backward pass. null: all at
    once. For very long rows."""
    offload_activations: bool = setting(False, reach=DESCRIBES)
    """Keep the inputs of recomputed blocks in pinned host memory until the backward pass, instead of in GPU memory."""
    defer_sync: bool | None = setting(None, reach=DESCRIBES)
    """Reduce gradients only on the last micro-batch of a step. null: if unsharded gradients fit in memory (fsdp2, hsdp). For
    ZeRO the stage decides."""


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
    """Size of an all-reduce bucket in MiB."""


@dataclass(kw_only=True, slots=True)
class Fsdp2Config(StrategyConfig):
    """Parameters, gradients and optimizer state sharded block by block with `fully_shard`."""

    name: StrategyName = StrategyName.fsdp2
    reshard_after_forward: bool = setting(True, reach=DESCRIBES)
    """Free a block's gathered parameters after its forward pass. `false` saves one all-gather and needs more memory."""
    cpu_offload: bool = setting(False, reach=DESCRIBES)
    """Keep parameters and optimizer state in host memory, and run the optimizer on the CPU."""
    replicate: int = number(1, least=0, advice="0 means one replica a host, or 2 on one host")
    """Number of replicas (hsdp). Parameters are sharded inside a replica. 0: one replica per host, or 2 on a single host."""


@dataclass(kw_only=True, slots=True)
class ZeroConfig(StrategyConfig):
    """DeepSpeed ZeRO: 1 shards optimizer state, 2 also gradients, 3 also parameters."""

    name: StrategyName = StrategyName.zero2
    stage: int = number(2, least=1, most=3, advice="chosen with strategy=zero1, zero2 or zero3")
    """ZeRO stage: 1, 2 or 3; set by the group choice."""
    offload_optimizer: str = setting("none", reach=DESCRIBES)
    """Where the optimizer state is kept: `none` (on the device), `cpu` or `nvme` (needs libaio and a C++ compiler)."""
    offload_parameters: str = setting("none", reach=DESCRIBES)
    """Where parameters that are not in use are kept (only stage 3): `none`, `cpu` or `nvme`."""
    nvme_path: str | None = setting(None, reach=Reach.place)
    """Directory on a local NVMe drive, needed for `nvme`."""
    bucket_mib: int | None = number(None, least=1, advice="25 (ddp) to 200 (zero) as a rule")
    """Size of a reduce or all-gather bucket in MiB. null: 200 on GPUs, 8 on CPUs."""
    persistence_threshold: int = number(100_000, least=0, advice="0 shards every parameter")
    """Parameters with fewer elements than this stay gathered (only stage 3)."""
    prefetch_mib: int = number(50, least=0, advice="0 gathers nothing ahead")
    """Size of the parameters that are gathered ahead of their use, in MiB (only stage 3)."""


UpdateFilter = Callable[["Tensor"], "Tensor"]
"""Decides whether to skip an update. Takes the gradients' global norm before clipping (0-d, on the device). Returns a 0-d bool
tensor on the same device, equal on all ranks: True to skip. It may communicate: all ranks call it, at most once a step."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one optimizer step reports. Tensors stay on the device; reading them is the caller's choice of a sync."""

    grad_norm: Tensor
    """Global L2 norm of the gradients before clipping, a 0-d float32 tensor, equal on all ranks."""
    skipped: Tensor
    """0-d float32 tensor, equal on all ranks: 1 if the update was skipped, because gradients were not finite or the filter
    said so."""


class ParameterSource(Protocol):
    """Where initial parameter values come from. No call communicates: each rank may read other elements."""

    def read_slice(self, name: str, shape: torch.Size, start: int, stop: int) -> Tensor:
        """Elements `[start, stop)` of the flattened full parameter `name`, on the CPU."""


@dataclass(slots=True)
class StepPlan:
    """What the run decides about its training step beyond the settings of the strategy. Engines read it in `prepare`."""

    host_inputs: HostInputs | None = None
    """Keeps the inputs of recomputed blocks on the host; None: they stay on the device. Set when blocks are prepared."""
    recomputation: list[ActivationCheckpointing] | None = None
    """What the backward pass recomputes, for each block in the order of `shard_units`.

    None: `strategy.activation_checkpointing` holds for all blocks.
    """
    defer_sync: bool | None = None
    """Whether ranks reduce gradients only on the last micro-batch of a step. None: take `strategy.defer_sync`."""
    gathered_as_one: frozenset[str] = frozenset()
    """Classes of modules that are gathered together with their submodules, because their forward pass reaches into them."""
    expert_parallel_modules: tuple[str, ...] = ()
    """Modules of the step module, by name, whose experts are distributed over `expert_ranks` ranks (fsdp2, hsdp)."""
    expert_ranks: int = 1
    """Ranks over which the experts of a layer are distributed. 1: no expert parallelism; each rank gathers all of a layer."""
    ema_decay: float = 0.0
    """Decay of the moving average of the weights, which is evaluated and exported in place of the weights. 0: no average."""
    optimizer_hooks: OptimizerStepHooks | None = None
    """What the tuning method does around each optimizer step; None if it does nothing."""
    further_units: list[nn.Module] = field(default_factory=list)
    """Modules that are gathered one at a time as the blocks are, but that no training step computes; inner ones first."""
    keeps_initial_weights: bool = False
    """Whether the engine keeps a copy of the trained weights as they begin, for `InferenceWeights.initial`."""


def plan_of(step_module: nn.Module) -> StepPlan:
    """The plan that a step module carries."""
    return cast(StepModule, step_module).plan


def units_gathered_one_at_a_time(step_module: nn.Module) -> list[nn.Module]:
    """Modules whose parameters are gathered one at a time: the repeated blocks in forward order, then the `further_units`."""
    return [*cast(StepModule, step_module).shard_units(), *plan_of(step_module).further_units]


class StepModule(Protocol):
    """What a strategy shards: one root module whose forward takes a batch and returns the summed terms."""

    plan: StepPlan

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]: ...
    def shard_units(self) -> list[nn.Module]:
        """The repeated blocks, in forward order, that are gathered one at a time."""


class OptimizerStepHooks(Protocol):
    """What a tuning method does around each optimizer step. Needs full parameters and gradients on every rank.

    The hooks stand in the step module's plan. A run that combines them with sharding is refused when it is composed.
    No call communicates, and all ranks make the same calls.
    """

    def begin(self, total_steps: int) -> None:
        """Called before training. `total_steps` counts all optimizer steps of the run, also those before a resume."""

    def before_clip(self, loss_scale: Tensor | None) -> None:
        """Called when gradients are reduced and not yet clipped. `loss_scale`: 0-d, in fp16; None in other precisions."""

    def after_update(self, step: int, *, is_applied: bool) -> None:
        """Called after optimizer step `step`, counted from 1. The clipped gradients are still there.

        `is_applied`: whether the weights were updated; false if the update was skipped.
        """

    def state_of(self, name: str) -> dict[str, Tensor]:
        """What a checkpoint keeps for the parameter `name` beside its moments: always the same keys.

        The tensors are live and contiguous, and have the parameter's shape.
        """

    def after_restore(self) -> None:
        """Called after a checkpoint has overwritten the tensors of `state_of`."""


OptimizerFactory = Callable[[Iterable[tuple[str, "nn.Parameter"]]], "torch.optim.Optimizer"]
"""Builds the optimizer from the trainable (plain name, parameter) pairs, after sharding."""


PROGRESS_KEYS = {"recent_steps": "recent", "skipped_samples": "passed"}
"""Keys in `progress.json` and `run.json` of the fields of `Progress` that have another name there."""


@dataclass(kw_only=True, slots=True)
class Progress:
    """How far a run is. `samples` and `skipped_samples` are the whole state of the data order.

    The names of the fields are keys of `progress.json`, except those in `PROGRESS_KEYS`.
    """

    step: int = 0
    """Optimizer steps taken."""
    samples: int = 0
    """Documents (packs) consumed since the start of the run, without those that are skipped."""
    round_step: int = 0
    """Steps taken of the round that is being learned from (`objective=grpo`). 0 between rounds, and where there are none."""
    tokens: int = 0
    """Tokens consumed, all ranks together."""
    supervised_tokens: int = 0
    """Supervised tokens consumed, all ranks together."""
    best_metric: float | None = None
    """Best value so far of the metric that evaluation watches."""
    best_step: int | None = None
    """Step at which `best_metric` was reached."""
    seen_metric: float | None = None
    """Best value of it in any evaluation, also of one whose weights were not saved; early stopping goes by it."""
    seen_step: int | None = None
    """Step at which `seen_metric` was reached."""
    evaluate_every: int | None = None
    """Steps between evaluations that `evaluation.every_steps=auto` became at the first step; None before, and for a number."""
    stale_evaluations: int = 0
    """Evaluations since the best one, for early stopping."""
    owes_evaluation: bool = False
    """Whether a stop interrupted the evaluation of this step. A resumed run makes it up before the next step."""
    skipped_steps: int = 0
    """Steps whose update was skipped, because a gradient was not finite or the step was an outlier."""
    outliers: int = 0
    """Steps whose loss or gradient norm stood out."""
    recent_steps: list[dict[str, float]] = field(default_factory=list)
    """Loss and gradient norm of the last steps, with which the anomaly guards compare the next ones."""
    level_rows: list[dict[str, float]] = field(default_factory=list)
    """The last steps as the search for levels remembers them (`trainer/monitors/levels.py`)."""
    rollbacks: int = 0
    """Times that the run went back to a checkpoint, since a step stood out."""
    skipped_samples: list[dict[str, int]] = field(default_factory=list)
    """Ranges of the sample order that rollbacks left out, since a step on them stood out: `first` position and `count`."""
    evaluations: list[dict[str, float]] = field(default_factory=list)
    """`step`, `train` and `held_out` loss of each evaluation, from which overfitting is detected."""
    interval_loss: float = 0.0
    """Sum of the training losses of the steps since the last evaluation."""
    interval_steps: int = 0
    """Number of these steps."""
    reward_blocks: list[dict[str, float]] = field(default_factory=list)
    """Sums of rewards and their company over blocks of steps (`trainer/monitors/rewards.py`); empty without rewards."""
    first_loss: float | None = None
    """Training loss of step 1, before any update, to compare the last steps with. None in states of earlier versions."""
    recent_losses: list[dict[str, float]] = field(default_factory=list)
    """`loss` of each of the last steps, the newest last."""
    wandb_id: str | None = None
    """The W&B run that a resumed run continues."""
    metric_names: int = 1
    """Edition of the names of metrics in that run (`trainer/reporting/metric_names.py`)."""

    def as_json(self) -> dict[str, Any]:
        """The fields under their keys in `progress.json` and `run.json`."""
        return {PROGRESS_KEYS.get(name, name): value for name, value in asdict(self).items()}

    def overwrite_with(self, other: Progress) -> None:
        """Set every field to that of `other`, for objects that hold this one."""
        for progress_field in fields(self):
            setattr(self, progress_field.name, getattr(other, progress_field.name))

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Progress:
        """The progress whose `as_json` is `content`."""
        names = {key: name for name, key in PROGRESS_KEYS.items()}
        return cls(**{names.get(key, key): value for key, value in content.items()})


class FullParameters:
    """Makes the full parameters available on every rank. This base class is for engines that never shard them."""

    sharded = False
    """Whether parameters are sharded, so that there is something to gather."""
    forward_is_collective = False
    """Whether a forward pass sends tokens to other ranks even inside `gathered`, because of expert parallelism."""

    def gather_bytes(self) -> int | None:
        """Bytes that gathering takes on this rank's device, on top of its own shard. None if gathering is impossible."""
        return 0

    def gathered(self) -> AbstractContextManager[None]:
        """Inside the context every rank holds all parameters: forward passes without gradients then gather nothing.

        Such a pass needs no other rank, unless `forward_is_collective` is true.

        All ranks must enter and leave it together, and may take no optimizer step inside.
        """
        return nullcontext()


class Engine(Protocol):
    """A live, sharded training step; one a run."""

    rank: int
    world_size: int
    step_module: nn.Module
    """The step module, sharded; its parameters are this rank's part."""
    host_memory: HostMemory | None
    """Shared memory that CPU ranks of one host exchange through. None: they use their process group."""
    full_parameters: FullParameters
    """Gathers parameters on every rank, for many forward passes in a row (generation)."""

    def forward(self, batch: dict[str, Any], *, last: bool) -> dict[str, Tensor]:
        """Run the sharded step module; returns {term: sum over the micro-batch}. All ranks must call.

        `last` marks the last micro-batch of the step: some engines decide in the forward pass whether to reduce gradients.
        """

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate gradients. On the `last` micro-batch of the step the ranks reduce them. All ranks must call."""

    def step(self, lr_factor: float, update_filter: UpdateFilter | None = None) -> StepResult:
        """Clip, update and zero. Each parameter group's own base rate is multiplied by `lr_factor`. All ranks must call.

        If gradients are not finite, or `update_filter` says so, the update is skipped: weights, moments and the count of
        updates stay as they are. The filter is called whenever the gradients are finite.
        """

    def inference(self, weights: InferenceWeights = InferenceWeights.averaged) -> AbstractContextManager[nn.Module]:
        """The step module in eval mode, for forward passes without gradients, with these weights. All ranks must enter.

        Restores training mode and the trained weights.
        """

    def state(self, progress: Progress) -> RankState:
        """The training state of this moment, ready to be written. All ranks must call.

        Its tensors are the live ones: write them, or copy them, before the next step.
        """

    def load(self, path: Path) -> Progress:
        """Read a training state, whatever strategy and world size wrote it. Call it between steps. All ranks must call.

        Raises on every rank: StorageError if files cannot be used, ConfigError if the state is of another kind of run.
        """

    def gather_full_parameters(self, *, trainable_only: bool) -> Iterator[tuple[str, Tensor | None]]:
        """(plain name, full parameter on the CPU), one by one; None in place of the tensor on all ranks but 0.

        Gathering communicates: all ranks must exhaust the iterator.
        """

    def close(self) -> None:
        """Free gradients and optimizer state; the engine is not used again. No collective.

        Parameters are freed once nobody refers to them.
        """


class Strategy(Protocol):
    """Builds an engine out of a step module that lives on the meta device."""

    def prepare(
        self,
        step_module: nn.Module,
        *,
        source: ParameterSource,
        make_optimizer: OptimizerFactory,
        max_grad_norm: float,
    ) -> Engine:
        """Shard, load the values that this rank holds, then build the optimizer. All ranks must call."""

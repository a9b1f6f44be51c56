"""The whole configuration of a run: one typed tree, composed by Hydra.

Leaf settings live beside the code that uses them; this module composes them and owns the settings that belong to the
run itself. Ranges and cross-field rules are `trainer.config.validate`'s.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, is_dataclass
from enum import StrEnum
from typing import Any, get_args, get_origin, get_type_hints

from strategies.base import Precision, StrategyConfig
from strategies.errors import ConfigError
from strategies.matmul import Matmul
from trainer.checkpoints.config import CheckpointConfig
from trainer.config.review import ReviewConfig
from trainer.config.sbatch_options import GpuRequest, gpu_request, ranks_per_node
from trainer.data.batches.order import BudgetConfig
from trainer.data.config import DataConfig
from trainer.data.tokens.clock import TemplateDate
from trainer.evaluation.base import EvaluationConfig
from trainer.export.config import ExportConfig
from trainer.model.config import ModelConfig
from trainer.monitors.config import ChallengesConfig
from trainer.monitors.guard_config import GuardsConfig
from trainer.objectives.base import ObjectiveConfig
from trainer.optim.config import OptimConfig
from trainer.optim.schedule import ScheduleConfig
from trainer.reporting.config import LoggingConfig
from trainer.reporting.profile import ProfileConfig
from trainer.reporting.resolution import Resolution, resolution_of
from trainer.tuning.base import TuningConfig


class Device(StrEnum):
    """`auto` takes CUDA where there is any."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


AUTO, MICRO, STRATEGY, MATMUL = "auto", "batch.micro", "strategy", "run.matmul"
RESOLVED = (MICRO, STRATEGY, MATMUL)
"""Settings that the run resolves once. Every later start reads the choice back."""
TEMPLATE_DATE = "data.date"
"""The substitution that has the date which the chat template writes for today."""
RETRIES = ("preempted", "node_fail", "out_of_memory")
"""Causes after which a run may be started again by itself; an error is none."""


class LauncherName(StrEnum):
    """The names users type as `launcher=<name>`."""

    local = "local"
    slurm = "slurm"


class Preflight(StrEnum):
    """`full` looks at each node and lets the ranks exchange, `nodes` only looks, `none` does neither."""

    full = "full"
    nodes = "nodes"
    none = "none"


class Container(StrEnum):
    """`auto` takes apptainer for `.sif` files and addresses with `://`, and pyxis for other names."""

    auto = "auto"
    pyxis = "pyxis"
    apptainer = "apptainer"


class Code(StrEnum):
    """`snapshot` is a copy in the run directory, made when the job is submitted; `clone` what stands there at each start."""

    snapshot = "snapshot"
    clone = "clone"


@dataclass(kw_only=True, slots=True)
class RunSettings:
    """Identity of the run."""

    dir: str | None = None
    """Directory of the run; its last part is the run id. Default: runs/<config hash>-<SLURM job id or start time>."""
    resume: str = "auto"
    """`auto` continues an unfinished directory with the same config, `never` refuses one, or a checkpoint directory."""
    accept: list[str] = field(default_factory=list)
    """Kinds of change with which a run is resumed all the same: data, base, tuning, order, precision, code, ..."""
    seed: int = 42
    """Seed of data order and of newly initialised parameters."""
    device: Device = Device.auto
    """`auto`, `cpu` or `cuda`."""
    threads: int = 0
    """CPU threads per rank; 0 divides the cores this job may use by the ranks on the host."""
    matmul: Matmul = Matmul.auto
    """Library of fp32 matrix products on CPUs: torch's `blas`, `onednn`, or `auto` (by processor, once for the whole run)."""
    shared_memory: bool = True
    """CPU ranks on one host exchange parameters and gradients through shared memory; false: through gloo's sockets."""
    lease_s: int = 120
    """Seconds without a sign of life after which another host may take over the directory of a run that left no word."""
    must_fit: bool = False
    """On GPUs simulate the step before the model is built, and end with exit code 69 where it takes more memory than there is."""
    timeout_s: int = 600
    """Seconds after which a collective that makes no progress ends the job."""


@dataclass(kw_only=True, slots=True)
class LauncherConfig:
    """How processes are started."""

    name: LauncherName = LauncherName.local
    """Which launcher starts the processes; set by the group choice `launcher=<name>`."""
    processes: int | None = None
    """Processes per host; default: one per GPU (under SLURM: that the job asks for), or one on a CPU-only host."""
    nodes: int = 1
    """Number of hosts; without SLURM name them in `hosts`, or start the same command on each."""
    hosts: list[str] = field(default_factory=list)
    """Hosts on which the ranks are started from here, over ssh, such as `[n1,n2]`; they meet on the first."""
    ssh: list[str] = field(default_factory=list)
    """Further options of ssh to `hosts`, such as `[-p,2222]`; what is true of a host always stands better in ~/.ssh/config."""
    rdzv: str | None = None
    """host:port that all hosts of a multi-host run can reach; any free port of the first host."""
    node_rank: int | None = None
    """Index of this host, 0 (that of `rdzv`) to nodes-1: on all hosts or on none; two hosts know it without."""
    address: str | None = None
    """Name or address under which the others reach this host; default: that of its interface towards `rdzv`."""
    stage: str | None = None
    """Directory on a disk of each node, such as `/scratch` or `$TMPDIR`, to which weights and tokens are copied and read from."""
    retry: dict[str, int] = field(default_factory=lambda: dict.fromkeys(RETRIES, 0))
    """Restarts: `preempted` (told to save), `node_fail` (a rank lost), `out_of_memory` (micro halved); under SLURM 20, 3, 0."""

    @property
    def per_node(self) -> int:
        """Ranks of each host; 1 where nothing is said of them."""
        return self.processes or 1

    @property
    def in_place(self) -> bool:
        """Whether there is one rank, which may be the process of the command itself."""
        return self.nodes == 1 and self.processes == 1 and not self.hosts


@dataclass(kw_only=True, slots=True)
class SlurmConfig(LauncherConfig):
    """What `sbatch` is asked for; the rendered script is kept in the run directory."""

    name: LauncherName = LauncherName.slurm
    retry: dict[str, int] = field(default_factory=lambda: {"preempted": 20, "node_fail": 3, "out_of_memory": 0})
    """Times it is requeued: `preempted` (told to save), `node_fail` (a rank or its node lost), `out_of_memory` (micro halved)."""
    partition: str | None = None
    """Partition; default: the cluster's."""
    account: str | None = None
    """Account to charge."""
    qos: str | None = None
    """Quality of service."""
    time: str = "24:00:00"
    """Time limit, as [days-]hours:minutes:seconds."""
    gpus_per_node: int = 0
    """GPUs per node; 0 asks for none (CPU nodes)."""
    cpus_per_task: int | None = None
    """CPUs for the one task (torchrun) on each node."""
    mem: str | None = None
    """Memory per node, such as 200G."""
    gres: str | None = None
    """Generic resources of each node, such as `gpu:a100:4`, on clusters without `gpus_per_node`."""
    exclusive: bool = False
    """Ask for whole nodes."""
    constraint: str | None = None
    """Node features, such as `h100`."""
    exclude: str | None = None
    """Nodes that are not wanted, such as `n[3,7]`."""
    reservation: str | None = None
    """Reservation whose nodes are taken."""
    job_name: str | None = None
    """Name of the job, in the queue and in its log files; default: that of the run directory."""
    comment: str | None = None
    """Comment of the job."""
    after: str | None = None
    """Id of a job that must have ended well before this one starts; where it fails, this one is cancelled."""
    dependency: str | None = None
    """Further conditions of the start in SLURM's words, such as `afterany:17`."""
    mail: str | None = None
    """Events that are mailed, such as `END,FAIL`."""
    mail_user: str | None = None
    """Who is mailed; default: who submits."""
    array_limit: int | None = None
    """Most runs of a job array at a time."""
    signal_lead_s: int = 180
    """Seconds before the time limit at which the job is told to save and requeue; at least a step plus two saves."""
    setup: list[str] = field(default_factory=list)
    """Shell lines run on every node before training, such as `module load cuda`."""
    python: str | None = None
    """Python interpreter on the nodes; default: the one that submits. In a container: its interpreter, default `python3`."""
    code: Code = Code.snapshot
    """Which code a job runs: a `snapshot` made when it is submitted, or the `clone` as it is whenever the job starts."""
    container: str | None = None
    """Image in which the ranks run: an enroot name or file (pyxis), or a `.sif` file or address (apptainer)."""
    container_by: Container = Container.auto
    """What starts the image: `pyxis`, `apptainer`, or `auto`, by the image's name."""
    container_mounts: list[str] = field(default_factory=list)
    """Mounts beside those of the run's own files, such as `/scratch:/scratch:ro`."""
    container_workdir: str | None = None
    """Directory in the image in which the ranks start; default: where the job was submitted."""
    pipeline: list[str] = field(default_factory=list)
    """Parts that are submitted as a chain of jobs, of `[prepare,train,evaluate,export]`; a part that fails ends the rest."""
    cpu_partition: str | None = None
    """Partition of the parts that need no GPU, `prepare` and `export`; default: that of the run."""
    part_options: dict[str, list[str]] = field(default_factory=dict)
    """Further `#SBATCH` options of a part, such as `{prepare:[--cpus-per-task=32]}`."""
    preflight: Preflight = Preflight.full
    """What a job of several nodes is asked before its ranks start: `full` (nodes, then exchange), `nodes`, or `none`."""
    extra: list[str] = field(default_factory=list)
    """Further `#SBATCH` options, such as `--reservation=x`."""

    @property
    def per_node(self) -> int:
        """Ranks of each node: `processes`, else one for each GPU that the job asks for, else 1."""
        return ranks_per_node(asdict(self))

    @property
    def gpu_request(self) -> GpuRequest | None:
        """The GPUs that the job asks for on each node; None if it asks for none."""
        return gpu_request(asdict(self))


@dataclass(kw_only=True, slots=True)
class RunConfig:
    """Everything a run needs to know. Frozen once as `config.yaml` in the run directory."""

    run: RunSettings = field(default_factory=RunSettings)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    batch: dict[str, Any] = field(default_factory=lambda: {"global": 32, "micro": 4})
    """`global`: documents (packs) an optimizer step; `micro`: most of them in one forward pass of one rank, or `auto`."""
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    precision: Precision = Precision.auto
    """`fp32`, `bf16`, `fp16` or `auto` (on GPUs bf16 where the hardware has it, else fp16; on CPUs fp32)."""
    tuning: TuningConfig = field(default_factory=TuningConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    guards: GuardsConfig = field(default_factory=GuardsConfig)
    challenges: ChallengesConfig = field(default_factory=ChallengesConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    gates: dict[str, Any] = field(default_factory=dict)
    """What must hold for an export: a bound by metric, as {eval/loss: "<2.1", memorised: 0}; `override` says why not."""
    review: ReviewConfig = field(default_factory=ReviewConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    launcher: LauncherConfig = field(default_factory=LauncherConfig)
    substitutions: dict[str, Any] = field(default_factory=dict)
    """What stands in for settings, by key; not set by hand.

    A Resolution if a later start of the run goes on from it (`RESOLVED`), else a sentence that is only shown.
    """

    def __post_init__(self) -> None:
        resolved = {
            key: resolution_of(key, note) or note for key, note in self.substitutions.items() if key in RESOLVED
        }
        self.substitutions = {**self.substitutions, **resolved}

    def resolution(self, setting: str) -> Resolution | None:
        """What became of a setting of `RESOLVED`; None if the run has not resolved it."""
        return resolution_of(setting, self.substitutions.get(setting))


def asked_micro(batch: dict[str, Any], substitutions: dict[str, Any]) -> Any:
    """What the user set `batch.micro` to before the run changed it: `auto`, or a number with which memory ran out.

    `batch` and `substitutions` are those of a configuration as plain dictionaries.
    """
    resolution = resolution_of(MICRO, substitutions.get(MICRO))
    if resolution is None or resolution.chosen != batch["micro"]:
        return batch["micro"]
    return resolution.asked


def asked_strategy(strategy: dict[str, Any], substitutions: dict[str, Any]) -> dict[str, Any]:
    """The settings of `strategy=auto` if the run chose this strategy itself; else the strategy's settings as they are."""
    resolution = resolution_of(STRATEGY, substitutions.get(STRATEGY))
    if resolution is None or (resolution.asked, resolution.chosen) != (AUTO, strategy["name"]):
        return strategy
    return {each.name: strategy[each.name] for each in fields(StrategyConfig) if each.name in strategy} | {"name": AUTO}


def kept_date(config: RunConfig) -> TemplateDate | None:
    """The date that the chat template writes for today since the run's first start; None before that. Errors: ConfigError."""
    note = config.substitutions.get(TEMPLATE_DATE)
    if note is None:
        return None
    try:
        return TemplateDate.parse(str(note))
    except ValueError as error:
        raise ConfigError(f"substitutions: {TEMPLATE_DATE} is {note!r} in config.yaml, which is no date") from error


def kept_matmul(config: RunConfig) -> Matmul:
    """The library of float32 products as typed, or what `auto` was resolved to at the run's first start; `auto` before that."""
    if config.run.matmul is not Matmul.auto:
        return config.run.matmul
    resolution = config.resolution(MATMUL)
    if resolution is None or resolution.asked != AUTO or resolution.chosen not in (Matmul.blas, Matmul.onednn):
        return Matmul.auto
    return Matmul(resolution.chosen)


def leaves(settings: type, prefix: str) -> dict[str, Any]:
    """Types of the settings of a class by full key, nested ones included; `*` stands for a name the user chooses."""
    found: dict[str, Any] = {}
    for name, hint in get_type_hints(settings).items():
        key = f"{prefix}.{name}"
        entry = get_args(hint)[1] if get_origin(hint) is dict else None
        if is_dataclass(hint):
            assert isinstance(hint, type)
            found |= leaves(hint, key)
        elif is_dataclass(entry):
            assert isinstance(entry, type)
            found |= leaves(entry, f"{key}.*")
        else:
            found[key] = hint
    return found

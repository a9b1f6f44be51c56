"""The whole configuration of a run: one typed tree, composed by Hydra. Read `RunConfig` first.

The settings of a group (`optim`, `data` ...) are a dataclass beside the code that uses them. This module puts them together
and owns the groups that belong to the run itself: `run`, `launcher` and `batch`. A field says everything about its setting
(`strategies/settings.py`), `trainer/config/tree.py` lists the fields by key, and `trainer/config/validate.py` has the rules
between settings.

A group whose choices differ in their keys (`tuning=lora`, `strategy=fsdp2`, `launcher=slurm`) has the class that all choices
share as its type here. A run holds the subclass of its choice.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from typing import Any

from strategies.base import Precision, StrategyConfig
from strategies.errors import ConfigError
from strategies.matmul import Matmul
from strategies.settings import DESCRIBES, FREE, Reach, group, number, setting
from trainer.checkpoints.config import CheckpointConfig
from trainer.config.parallel import ParallelConfig
from trainer.config.review import ReviewConfig
from trainer.config.sbatch_options import GpuRequest, gpus_per_node_request, ranks_per_node
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
from trainer.reporting.resolution import ResolvedSetting, parse_resolution
from trainer.tuning.base import TuningConfig


class Device(StrEnum):
    """`auto` takes CUDA if torch sees a GPU."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


AUTO, MICRO_BATCH_KEY, STRATEGY_KEY, MATMUL_KEY, LEARNING_RATE_KEY = (
    "auto",
    "batch.micro",
    "strategy",
    "run.matmul",
    "optim.lr",
)
RESOLVED = (MICRO_BATCH_KEY, STRATEGY_KEY, MATMUL_KEY, LEARNING_RATE_KEY)
"""Settings that the run resolves once. Every later start reads the choice back."""
TEMPLATE_DATE_KEY = "data.date"
"""The substitution that has the date which the chat template writes for today."""
RETRY_CAUSES = ("preempted", "node_fail", "out_of_memory")
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

    dir: str | None = setting(None, reach=Reach.place)
    """The run directory. Its last part is the run id. Default: runs/<config hash>-<SLURM job id or start time>."""
    resume: str = setting("auto", reach=DESCRIBES)
    """`auto` resumes an unfinished run with the same config. `never` refuses one. Or a checkpoint directory to start from."""
    accept: list[str] = setting(default_factory=list, reach=DESCRIBES)
    """Kinds of change that do not keep a run from being resumed: data, base, tuning, order, precision, code, ..."""
    seed: int = number(42, least=0, advice="the default is 42", resume="order")
    """Seed of data order and of newly initialised parameters."""
    device: Device = setting(Device.auto, reach=DESCRIBES)
    """`auto`, `cpu` or `cuda`."""
    threads: int = number(0, least=0, advice="0 divides the cores by the ranks of the host")
    """CPU threads per rank; 0 divides the cores this job may use by the ranks on the host."""
    matmul: Matmul = setting(Matmul.auto, reach=DESCRIBES)
    """Library of fp32 matrix products on CPUs: torch's `blas`, `onednn`, or `auto` (by processor, once for the whole run)."""
    shared_memory: bool = setting(True, reach=DESCRIBES)
    """CPU ranks on one host exchange parameters and gradients through shared memory; false: through gloo's sockets."""
    lease_s: int = number(120, least=1, advice="a minute or more on network file systems; 120 is usual")
    """Seconds without a heartbeat after which another host may take over the run directory."""
    must_fit: bool = setting(False, reach=DESCRIBES)
    """On GPUs: simulate a step before the model is built. If it needs more memory than there is, end with exit code 69."""
    timeout_s: int = number(600, least=1, advice="minutes rather than seconds: 600 is usual")
    """Seconds after which a collective that makes no progress ends the job."""


@dataclass(kw_only=True, slots=True)
class LauncherConfig:
    """How processes are started."""

    name: LauncherName = setting(LauncherName.local, reach=DESCRIBES)
    """Which launcher starts the processes; set by the group choice `launcher=<name>`."""
    processes: int | None = number(None, least=1, advice="one a GPU")
    """Processes per host. Default: one per GPU (SLURM: per GPU of the job); one with `strategy=single` and on CPUs."""
    nodes: int = number(1, least=1, advice="the number of hosts")
    """Number of hosts. Without SLURM, name them in `hosts`, or start the same command on each."""
    hosts: list[str] = setting(default_factory=list, reach=Reach.command)
    """Hosts on which this command starts the ranks over ssh, such as `[n1,n2]`. The ranks meet on the first host."""
    ssh: list[str] = setting(default_factory=list, reach=Reach.command)
    """More options for ssh to `hosts`, such as `[-p,2222]`. Put what always holds for a host into ~/.ssh/config."""
    rdzv: str | None = setting(None, reach=Reach.address)
    """host:port that all hosts of the run can reach: any free port of the first host."""
    node_rank: int | None = number(None, least=0, advice="0 on the host that launcher.rdzv names")
    """Index of this host, from 0 (the host of `rdzv`) to nodes-1. Set it on all hosts or on none; two hosts do not need it."""
    address: str | None = setting(None, reach=Reach.address)
    """Name or address under which the other hosts reach this one. Default: the address of its interface towards `rdzv`."""
    stage: str | None = setting(None, reach=Reach.place)
    """Directory on a local disk of each node, such as `/scratch` or `$TMPDIR`. Weights and prepared data are copied to it, and
    read from there."""
    retry: dict[str, int] = setting(default_factory=lambda: dict.fromkeys(RETRY_CAUSES, 0), reach=DESCRIBES)
    """Number of restarts after each cause: `preempted` (the run was asked to stop), `node_fail` (a rank or its node was lost),
    `out_of_memory` (`batch.micro` is halved). Defaults under SLURM: 20, 3, 0."""

    @property
    def per_node(self) -> int:
        """Ranks of each host; 1 if no setting says a number."""
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
    """Number of requeues after each cause: `preempted` (the run was asked to stop), `node_fail` (a rank or its node was lost),
    `out_of_memory` (`batch.micro` is halved)."""
    partition: str | None = setting(None, reach=DESCRIBES)
    """SLURM partition. Default: that of the cluster."""
    account: str | None = setting(None, reach=DESCRIBES)
    """SLURM account that is charged."""
    qos: str | None = setting(None, reach=DESCRIBES)
    """SLURM quality of service (QOS)."""
    time: str = setting("24:00:00", reach=DESCRIBES)
    """Time limit, as [days-]hours:minutes:seconds."""
    gpus_per_node: int = number(0, least=0, advice="0 for CPU nodes")
    """GPUs per node; 0 asks for none (CPU nodes)."""
    cpus_per_task: int | None = number(None, least=1, advice="null leaves it to the cluster")
    """CPUs for the one task (torchrun) on each node."""
    mem: str | None = setting(None, reach=DESCRIBES)
    """Memory per node, such as 200G."""
    gres: str | None = setting(None, reach=DESCRIBES)
    """Generic resources of each node, such as `gpu:a100:4`, on clusters without `gpus_per_node`."""
    exclusive: bool = setting(False, reach=DESCRIBES)
    """Ask for whole nodes."""
    constraint: str | None = setting(None, reach=DESCRIBES)
    """Node features, such as `h100`."""
    exclude: str | None = setting(None, reach=DESCRIBES)
    """Nodes to avoid, such as `n[3,7]`."""
    reservation: str | None = setting(None, reach=DESCRIBES)
    """Reservation whose nodes the job uses."""
    job_name: str | None = setting(None, reach=DESCRIBES)
    """Name of the job, in the queue and in its log files. Default: the name of the run directory."""
    comment: str | None = setting(None, reach=DESCRIBES)
    """Comment of the SLURM job."""
    after: str | None = setting(None, reach=DESCRIBES)
    """Id of a job that must succeed before this one starts. If it fails, this one is cancelled."""
    dependency: str | None = setting(None, reach=DESCRIBES)
    """More dependencies of the job, in SLURM's syntax, such as `afterany:17`."""
    mail: str | None = setting(None, reach=Reach.address)
    """Events for which SLURM sends mail, such as `END,FAIL`."""
    mail_user: str | None = setting(None, reach=Reach.address)
    """Who gets the mail. Default: the user who submits."""
    array_limit: int | None = number(None, least=1, advice="null runs all at a time")
    """Largest number of a job array's runs that run at the same time."""
    signal_lead_s: int = number(180, least=1, advice="a step plus two saves, at least 60")
    """Seconds before the time limit at which the job is asked to save a checkpoint and to requeue itself. Needs at least the
    time of one step and two saves."""
    setup: list[str] = setting(default_factory=list, reach=Reach.command)
    """Shell commands that run on every node before training, such as `module load cuda`."""
    python: str | None = setting(None, reach=Reach.command)
    """Python interpreter on the nodes. Default: the one that submits. In a container: its interpreter, default `python3`."""
    code: Code = setting(Code.snapshot, reach=Reach.command)
    """The code that a job runs: a `snapshot` made when it is submitted, or the `clone` as it is when the job starts."""
    container: str | None = setting(None, reach=Reach.command)
    """Container image in which the ranks run: an enroot name or file (pyxis), or a `.sif` file or address (apptainer)."""
    container_by: Container = setting(Container.auto, reach=Reach.command)
    """What starts the image: `pyxis`, `apptainer`, or `auto`, by the image's name."""
    container_mounts: list[str] = setting(default_factory=list, reach=Reach.command)
    """Mounts in addition to those of the run's own files, such as `/scratch:/scratch:ro`."""
    container_workdir: str | None = setting(None, reach=Reach.command)
    """Directory in the image in which the ranks start. Default: the directory from which the job was submitted."""
    pipeline: list[str] = setting(default_factory=list, reach=DESCRIBES)
    """Stages that are submitted as a chain of jobs, any of `[prepare,train,evaluate,export]`. If a stage fails, the later ones
    do not start."""
    cpu_partition: str | None = setting(None, reach=DESCRIBES)
    """Partition for the stages that need no GPU, `prepare` and `export`. Default: the partition of the run."""
    part_options: dict[str, list[str]] = setting(default_factory=dict, reach=Reach.command)
    """More `#SBATCH` options for single stages of the pipeline, such as `{prepare:[--cpus-per-task=32]}`."""
    preflight: Preflight = setting(Preflight.full, reach=DESCRIBES)
    """What a job on several nodes checks before training: `full` (each node, then communication between them), `nodes` (each
    node), or `none`."""
    extra: list[str] = setting(default_factory=list, reach=Reach.command)
    """More `#SBATCH` options, such as `--reservation=x`."""

    @property
    def per_node(self) -> int:
        """Ranks of each node: `processes`, else one for each GPU that the job asks for, else 1."""
        return ranks_per_node(asdict(self))

    @property
    def gpus_per_node_request(self) -> GpuRequest | None:
        """The GPUs that the job asks for on each node; None if it asks for none."""
        return gpus_per_node_request(asdict(self))


@dataclass(kw_only=True, slots=True)
class BatchSettings:
    """The entries of `batch`, which is a table because `global` is a keyword of Python."""

    global_: int = number(32, least=1, advice="documents a step, 32 to 256 as a rule", resume="order")
    """Documents (packs with `data.packing=true`, pairs of answers with `objective=dpo`, written answers with `objective=grpo`) in
    one optimizer step, all ranks together. Sets the noise of the gradient. Must be a multiple of `batch.micro` x ranks, for
    written answers of `objective.group_size`; accumulation is derived."""
    micro: int = number(4, least=1, advice="1 uses the least memory")
    """Most documents (packs) in one forward pass of one rank. Raise it until memory is full; the result does not change.
    `auto`: as many as memory allows, found at the first start (docs/planning.md)."""


@dataclass(kw_only=True, slots=True)
class RunConfig:
    """Everything a run needs to know. Frozen once as `config.yaml` in the run directory.

    `resume` is the kind of change that another value is when the run is resumed; `FREE` may change. The order of the fields is
    that of `config.yaml`.
    """

    # The run itself, and what it learns from.
    run: RunSettings = group(RunSettings, resume=FREE)
    model: ModelConfig = group(ModelConfig, resume="base")
    data: DataConfig = group(DataConfig, resume="data")

    # How many documents make a step, how long the run trains, in which arithmetic.
    batch: dict[str, Any] = setting(
        default_factory=lambda: {"global": 32, "micro": 4}, reach=DESCRIBES, resume=FREE, entries=BatchSettings
    )
    """`global`: documents (packs) in one optimizer step, over all ranks. `micro`: most documents in one forward pass of one
    rank, or `auto`."""
    budget: BudgetConfig = group(BudgetConfig, resume=FREE)
    precision: Precision = setting(Precision.auto, reach=DESCRIBES, resume="precision")
    """`fp32`, `bf16`, `fp16` or `auto`: on GPUs bf16 if the GPU supports it, else fp16; on CPUs fp32. `bf16` keeps fp32 master
    weights of trained parameters."""

    # What trains, towards which goal, on how many devices, and by which rule.
    tuning: TuningConfig = group(TuningConfig, resume="tuning")
    objective: ObjectiveConfig = group(ObjectiveConfig, resume="objective")
    strategy: StrategyConfig = group(StrategyConfig, resume=FREE)
    parallel: ParallelConfig = group(ParallelConfig, resume=FREE)
    optim: OptimConfig = group(OptimConfig, resume="optimizer")
    schedule: ScheduleConfig = group(ScheduleConfig, resume="optimizer")

    # What is watched on the way.
    guards: GuardsConfig = group(GuardsConfig, resume="optimizer")
    challenges: ChallengesConfig = group(ChallengesConfig, resume=FREE)
    evaluation: EvaluationConfig = group(EvaluationConfig, resume=FREE)

    # What is kept, and what is given to others.
    checkpoint: CheckpointConfig = group(CheckpointConfig, resume=FREE)
    export: ExportConfig = group(ExportConfig, resume=FREE)
    gates: dict[str, Any] = setting(default_factory=dict, reach=DESCRIBES, resume=FREE)
    """Limits that metrics of exactly these weights must meet before an export, by metric: `{eval/loss: "<2.1", forgetting:
    "<3%", memorised: 0, bias/gap: "<0.05", review/win_rate: ">0.5"}`. If a gate fails, nothing is exported (docs/papers.md).
    `gates.override="<reason>"` exports anyway."""
    review: ReviewConfig = group(ReviewConfig, resume=FREE)

    # What is recorded, and where the processes run.
    logging: LoggingConfig = group(LoggingConfig, resume=FREE)
    profile: ProfileConfig = group(ProfileConfig, resume=FREE)
    launcher: LauncherConfig = group(LauncherConfig, resume=FREE)

    # What the run has put in the place of `auto`.
    substitutions: dict[str, Any] = setting(default_factory=dict, reach=DESCRIBES, resume=FREE)
    """What stands in for settings, by key; not set by hand.

    A ResolvedSetting if a later start of the run goes on from it (`RESOLVED`), else a sentence that is only shown.
    """

    def __post_init__(self) -> None:
        resolved = {
            key: parse_resolution(key, note) or note for key, note in self.substitutions.items() if key in RESOLVED
        }
        self.substitutions = {**self.substitutions, **resolved}

    def resolution(self, setting: str) -> ResolvedSetting | None:
        """What became of a setting of `RESOLVED`; None if the run has not resolved it."""
        return parse_resolution(setting, self.substitutions.get(setting))


def requested_micro_batch(batch: dict[str, Any], substitutions: dict[str, Any]) -> Any:
    """What the user set `batch.micro` to before the run changed it: `auto`, or a number with which memory ran out.

    `batch` and `substitutions` are those of a configuration as plain dictionaries.
    """
    resolution = parse_resolution(MICRO_BATCH_KEY, substitutions.get(MICRO_BATCH_KEY))
    if resolution is None or resolution.chosen != batch["micro"]:
        return batch["micro"]
    return resolution.asked


def requested_strategy(strategy: dict[str, Any], substitutions: dict[str, Any]) -> dict[str, Any]:
    """The settings of `strategy=auto` if the run chose this strategy itself; else the strategy's settings as they are."""
    resolution = parse_resolution(STRATEGY_KEY, substitutions.get(STRATEGY_KEY))
    if resolution is None or (resolution.asked, resolution.chosen) != (AUTO, strategy["name"]):
        return strategy
    return {each.name: strategy[each.name] for each in fields(StrategyConfig) if each.name in strategy} | {"name": AUTO}


def settled_template_date(config: RunConfig) -> TemplateDate | None:
    """The date that the chat template writes for today since the run's first start; None before that. Errors: ConfigError."""
    note = config.substitutions.get(TEMPLATE_DATE_KEY)
    if note is None:
        return None
    try:
        return TemplateDate.parse(str(note))
    except ValueError as error:
        raise ConfigError(f"substitutions: {TEMPLATE_DATE_KEY} is {note!r} in config.yaml, which is no date") from error


def settled_matmul(config: RunConfig) -> Matmul:
    """The library of float32 products as typed, or what `auto` was resolved to at the run's first start; `auto` before that."""
    if config.run.matmul is not Matmul.auto:
        return config.run.matmul
    resolution = config.resolution(MATMUL_KEY)
    if resolution is None or resolution.asked != AUTO or resolution.chosen not in (Matmul.blas, Matmul.onednn):
        return Matmul.auto
    return Matmul(resolution.chosen)

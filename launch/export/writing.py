"""Writes an export out of checkpoints that were chosen before: in this process, or in several that share its files.

`launch/export/command.py` chooses the checkpoint and judges the gates. This module only writes.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.export.arguments import required_run_record
from strategies import exit_codes
from strategies.errors import ConfigError, ShardtuneError
from trainer.reporting.run_record import RUN_RECORD, RunRecord

if TYPE_CHECKING:
    from strategies.base import Precision
    from strategies.runtime import Runtime
    from trainer.config.run import RunConfig
    from trainer.data.prepare import PreparedData
    from trainer.export.trained_model import TrainedModel
    from trainer.export.verify import ProbeReference

CONFIG_FILE = "export-job.yaml"
JOB_FILE = "export-job.json"


class ExportProcessesFailed(ShardtuneError):
    """The processes that write an export have failed; what they met is on the screen."""

    def __init__(self, exit_code: int) -> None:
        how = "were stopped" if exit_code in exit_codes.STOPPED_CODES else "failed, as the lines above say"
        super().__init__(f"nothing was exported: its processes {how}")
        self.exit_code = exit_code


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportJob:
    """What is written where, and what its model card must say. Processes read it as JSON, by the names of these fields."""

    run: str
    """Directory of the run."""
    checkpoints: list[str]
    """Directories of the checkpoints whose mean is exported, the oldest first; mostly one."""
    to: str
    """The directory that is written."""
    gates: dict[str, Any] = field(default_factory=dict)
    """What the gates decided for these weights."""
    benchmarks: dict[str, str] = field(default_factory=dict)
    """The hub's data sets behind tasks."""
    accepted: list[str] = field(default_factory=list)
    """How the base differs from the one that the run was trained on, if the user accepts that."""
    reason_to_read_rows: dict[str, str] | None = None
    """Why the run's own rows are read (`ReasonToReadRows`); None if nothing needs them."""
    accept_data: bool = False
    """Whether today's rows may be used if those of the training are gone."""


def export_in_this_process(config: RunConfig, job: ExportJob) -> PreparedData:
    """Write the export in this process, the only rank of a process group on the CPU; returns the run's data.

    `bits=` measures a loss on that data. Raises the errors of `write_as_rank`.
    """
    from strategies.runtime import join_job, leave_job
    from trainer.config.run import settled_matmul

    run = config.run
    runtime = join_job("cpu", timeout_s=run.timeout_s, threads=run.threads, matmul=settled_matmul(config))
    try:
        return write_as_rank(config, job, runtime)
    finally:
        leave_job()


def export_in_processes(config: RunConfig, job: ExportJob, num_processes: int) -> None:
    """Write the export in several processes of this host, which read configuration and job from a temporary directory.

    The directory is removed, unless the processes fail: then it has their record of the failure. Raises ExportProcessesFailed
    if their exit code is not 0, also if they were stopped; their message is on the screen then.
    """
    from launch.cluster.supervisor import run_supervised
    from launch.cluster.torchrun import RankProgram
    from launch.config.frozen import config_sha256, config_yaml
    from trainer.config.run import LauncherConfig

    config = replace(config, launcher=LauncherConfig(processes=num_processes))
    sha256 = config_sha256(config)
    job_dir = Path(tempfile.mkdtemp(prefix="shardtune-export-"))
    (job_dir / JOB_FILE).write_text(json.dumps(asdict(job), indent=1) + "\n", encoding="utf-8")
    header = f"# Written by shardtune export.\n# sha256: {sha256}\n"
    (job_dir / CONFIG_FILE).write_text(header + config_yaml(config), encoding="utf-8")
    # Starts the processes, as those of a training, and waits for them.
    code = run_supervised(config, job_dir, sha256, program=RankProgram("launch.export", CONFIG_FILE))
    has_failed = code not in (0, *exit_codes.STOPPED_CODES)
    if not has_failed:
        shutil.rmtree(job_dir, ignore_errors=True)
    if code:
        raise ExportProcessesFailed(code)


def is_export_rank(environment: Mapping[str, str]) -> bool:
    """Whether this process is one of those that write an export, started by `export_in_processes`."""
    return "RANK" in environment and Path(environment.get("SHARDTUNE_CONFIG", "")).name == CONFIG_FILE


def run_export_as_rank() -> int:
    """Run as one of the processes that write an export; returns its exit code: 0, also if asked to stop, or 70 for an error.

    An error is recorded in the job's directory, where the launcher finds the first failure and shows it.
    """
    from launch.cluster.torchrun import die_with_parent
    from launch.config.compose import load_frozen_config
    from strategies import runtime as processes
    from strategies.errors import Preempted
    from trainer.config.run import settled_matmul
    from trainer.reporting.status import read_failure
    from trainer.session.attempt import open_rank_of_job

    if "TORCHELASTIC_RUN_ID" in os.environ:
        # Started by torchrun: a process must not outlive it.
        die_with_parent()
    # Configuration and job, as the launcher wrote them.
    config_file = Path(os.environ["SHARDTUNE_CONFIG"])
    job_dir = config_file.parent
    config = load_frozen_config(config_file)
    job = ExportJob(**json.loads((job_dir / JOB_FILE).read_text(encoding="utf-8")))
    run = config.run
    try:
        # This attempt owns the job's directory meanwhile, and records a failure there for the launcher.
        with open_rank_of_job(job_dir, run.lease_s) as (_, attempt):
            attempt.phase = "start of the processes"
            with attempt.join_ranks(run.timeout_s) as rendezvous:
                store = rendezvous.store
            runtime = processes.join_job(
                "cpu", timeout_s=run.timeout_s, threads=run.threads, matmul=settled_matmul(config), store=store
            )
            attempt.phase = "export"
            write_as_rank(config, job, runtime)
    except Preempted:
        return 0
    except Exception:
        if read_failure(job_dir):  # the launcher shows it
            return exit_codes.FAILED
        raise
    return 0


def write_as_rank(config: RunConfig, job: ExportJob, runtime: Runtime) -> PreparedData:
    """Describe the run's model and write its export, this process its share; returns the run's data. All ranks must call.

    Errors: those of building the model, of reading the checkpoint, and of writing.
    """
    from trainer.checkpoints.manifest import manifest_sha256
    from trainer.export.write import write_export
    from trainer.model.loading import load_tokenizer
    from trainer.reporting.documents.facts import read_model_card_facts
    from trainer.reporting.documents.questions import read_answers
    from trainer.reporting.results import held_out_metrics_at_step
    from trainer.session.exported_model import describe_trained_model
    from trainer.session.run_data import ReasonToReadRows, load_run_data, read_data_record

    run_dir = Path(job.run)
    tokenizer = load_tokenizer(config.model)
    record = required_run_record(run_dir)
    precision = _export_precision(config, record, run_dir)
    run_data = load_run_data(
        config,
        read_data_record(run_dir),
        tokenizer,
        reason_to_read=None if job.reason_to_read_rows is None else ReasonToReadRows(**job.reason_to_read_rows),
        accept_changed_rows=job.accept_data,
    )
    config.objective = run_data.objective
    data = run_data.data
    accepted_rows = run_data.accepted_differences
    if runtime.is_main:
        for line in accepted_rows:
            print(f"accepted: {line}", flush=True)
    checkpoints = [Path(path) for path in job.checkpoints]
    model = describe_trained_model(config, tokenizer, data, checkpoints, precision, total_steps=record.total_steps)

    # The run measured nothing of a mean of checkpoints, nor of a checkpoint on a base that has changed since.
    are_of_one_checkpoint = len(checkpoints) == 1 and not job.accepted
    progress = model.trained.progress()
    record = replace(record, label_names=data.label_names)
    facts = read_model_card_facts(run_dir, record, read_answers(config.export.answers)[0])
    facts.step = progress.step
    facts.tokens = progress.tokens
    facts.metrics_at_step = held_out_metrics_at_step(run_dir, progress.step)
    facts.are_of_one_checkpoint = are_of_one_checkpoint
    facts.artefact = manifest_sha256(checkpoints[-1]) if are_of_one_checkpoint else None
    facts.averaged_checkpoints = [path.name for path in checkpoints] if len(checkpoints) > 1 else []
    facts.accepted = [*job.accepted, *accepted_rows]
    facts.gates = job.gates
    facts.benchmarks = job.benchmarks
    # What the trained model computes, for `export.verify`; None: the export is not compared.
    reference = None
    if config.export.verify:
        reference = _compute_reference_for_export(config, data, model, precision, runtime)
    write_export(
        model, destination=Path(job.to), config=config.export, facts=facts, runtime=runtime, reference=reference
    )
    return data


def _compute_reference_for_export(
    config: RunConfig, data: PreparedData, model: TrainedModel, precision: Precision, runtime: Runtime
) -> ProbeReference:
    """Compute with the checkpoint's weights, on this host's CPU, what the export will be compared with. All ranks must call.

    Rank 0 loads the whole model, without the optimizer's moments, and frees it again; the others wait, and get an empty
    reference, since only rank 0 compares.
    """
    from strategies.parameters import num_elements_by_name
    from strategies.runtime import broadcast_object, longer_timeout
    from trainer.build.parts import build_engine
    from trainer.export.routing_choices import RoutingRecorder
    from trainer.export.trained_model import TrainedValues
    from trainer.export.verify import ProbeReference, compute_probe_reference
    from trainer.export.write import SLOWEST_DISK_BYTES_PER_S

    # The others wait as long as rank 0 may need to read the weights.
    float32_bytes = 4 * sum(num_elements_by_name(model.built.step_module).values())
    with longer_timeout(runtime, float32_bytes / SLOWEST_DISK_BYTES_PER_S):
        reference: ProbeReference | None = None
        if runtime.is_main:
            print(
                f"verify: the export is compared with the weights of {model.trained.title}, computed here on the CPU in "
                f"{precision} by the model that was trained",
                flush=True,
            )
            # If the run averages weights (ema_decay), the average is in the checkpoint's weights already.
            config_without_average = replace(config, optim=replace(config.optim, ema_decay=0.0))
            single_rank = replace(runtime, world_size=1, local_world_size=1)
            engine, built, _ = build_engine(
                config_without_average,
                model.tokenizer,
                data,
                precision,
                single_rank,
                # In place of the initial values: those of the checkpoint.
                values_of=lambda source: TrainedValues(source, model.trained),
            )
            # Its logits on the probe, a fixed sentence.
            reference = compute_probe_reference(engine, built, model.tokenizer, single_rank)
            engine.close()
        # The others wait here.
        broadcast_object(None, runtime)
    return reference or ProbeReference([], None, RoutingRecorder())


def _export_precision(config: RunConfig, record: RunRecord, run_dir: Path) -> Precision:
    """The precision in which the export is built and verified: that of the training, if a CPU can compute in it, else fp32.

    A CPU cannot compute in fp16; the parameters that a run in fp16 trains are float32 anyway. `auto` stands in the settings of
    a run whose record says no more; it becomes fp32. Raises ConfigError if the run's record names no precision.
    """
    from strategies.base import Precision

    precision_name = record.precision or config.precision
    if precision_name not in [*Precision]:
        raise ConfigError(
            f"{run_dir / RUN_RECORD}: its precision is {precision_name}, which is none of {', '.join(Precision)}; "
            f"restore {RUN_RECORD} from a copy"
        )
    precision = Precision(precision_name)
    if precision in (Precision.auto, Precision.fp16):
        return Precision.fp32
    return precision

"""`shardtune export`: turns a checkpoint of a run into a directory that plain transformers (and peft) loads."""

from __future__ import annotations

import os
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.config.help_text import show_help
from launch.config.verb_arguments import asks_for_help, help_rows, read_arguments
from launch.export import average, combine, writing
from launch.export import gguf as export_gguf
from launch.export import hub as export_hub
from launch.export.arguments import (
    ExportArguments,
    export_destination,
    read_gates,
    refuse_no_run,
    unfinished_remark,
)
from launch.export.checkpoint_choice import find_checkpoint, warn_if_training_did_not_help
from launch.export.combine import CombineArguments
from launch.output import JSON_FLAG, print_json, stdout_to_stderr
from launch.serve.command import print_serve_commands
from strategies.errors import ConfigError

if TYPE_CHECKING:
    from launch.config.outside_values import ValueNeedingConsent
    from trainer.config.run import RunConfig
    from trainer.data.prepare import PreparedData
    from trainer.export.gates.judge import JudgedGates
    from trainer.session.run_data import ReasonToReadRows

GATE_HELP = {
    'gates={eval/loss: "<2.1"}': "more gates, beside those of the run",
    'gates.override="<why>"': "export although a gate fails; the reason is recorded",
}
USAGE = f"""usage: shardtune export <run> [key=value ...] [--json]
       shardtune export adapters=[<dir>,<dir>] to=<dir> [key=value ...] [--json]

  shardtune export runs/first checkpoint=best merge=true to=models/first
  shardtune export runs/first to=hub:team/first --dry-run
  shardtune export adapters=[runs/a/export,runs/b/export] weights=[0.7,0.3] to=models/merged

export turns a checkpoint into a model directory that transformers loads. It needs one process and no GPU, whatever
strategy and number of ranks the run trained with. launcher.processes=4 writes a large model with four processes.

The gates of the run, and those you type, must hold for the metrics of this checkpoint. If a gate fails, the exit code
is 69, unless gates.override gives a reason.

{help_rows(ExportArguments, GATE_HELP)}

With adapters=, export combines several LoRA adapters into one model:

{help_rows(CombineArguments)}"""


@dataclass(slots=True)
class ExportRequest:
    """One export: which checkpoint goes where, and what its model card must say."""

    run_dir: Path
    checkpoint: Path
    output_directory: Path
    averaged_checkpoints: list[Path] = field(default_factory=list)
    """Checkpoints whose mean is exported, the last of them `checkpoint`; empty: that one alone."""
    gate_verdicts: JudgedGates | None = None
    """The verdicts of the gates; None if there are no gates."""
    benchmarks: dict[str, str] = field(default_factory=dict)
    """The hub's data sets behind tasks."""
    checkpoint_choice: str = "auto"
    """The checkpoint as it was typed: `auto`, `last`, `best` or a step."""
    accepted_differences: list[str] = field(default_factory=list)
    """How the base differs from the one that the run was trained on, if the user accepts that."""
    reason_to_read_rows: ReasonToReadRows | None = None
    """Why the run's own rows are read (to calibrate `bits=`); None if nothing needs them."""
    accepts_changed_data: bool = False
    """Whether today's rows may be used if those of the training are missing."""
    trained_wandb_id: str = ""
    """The W&B run that wrote the checkpoint, read while the checkpoint is exported; empty: none, or not exported yet."""

    def checkpoints(self) -> list[Path]:
        """All checkpoints that the export is made of."""
        return self.averaged_checkpoints or [self.checkpoint]


def main(argv: list[str]) -> int:
    """Run `shardtune export` with these arguments: export a run's checkpoint, or combine adapters; returns the exit code.

    With --json, only the answer goes to stdout: what the commands print on their way goes to stderr. Errors: ConfigError,
    StorageError, DriftError, GateRefused, and ShardtuneError if the converter, the hub or a process that writes fails.
    """
    # This process is one of several that write one export.
    if writing.is_export_rank(os.environ):
        return writing.run_export_as_rank()
    if asks_for_help(argv):
        show_help(USAGE)
        return 0
    as_json = JSON_FLAG in argv
    with stdout_to_stderr(as_json):
        answer = combine.combine_adapters_command(argv) if combine.asks_to_combine(argv) else export_command(argv)
    if as_json:
        print_json(answer)
    return 0


def read_export_arguments(argv: list[str]) -> tuple[ExportArguments, dict[str, Any]]:
    """Read and check the command line of `shardtune export`; returns (its arguments, the gates among them by metric).

    Errors: ConfigError.
    """
    arguments, problems = read_arguments("export", ExportArguments, argv)
    gates, unusable_gates = read_gates(arguments.gates)
    problems += unusable_gates
    if arguments.average is not None and "checkpoint" in arguments.text_by_key:
        problems.append(
            f"average={arguments.average}: says which checkpoints; leave checkpoint={arguments.checkpoint} out"
        )
    if "data" in arguments.accept and arguments.bits is None:
        # bits= also writes a copy in 4 or 8 bits, whose loss is measured on the run's data.
        problems.append(
            f"accept={arguments.text_by_key['accept']}: only bits= reads the run's data; write accept=[base]"
        )
    if problems:
        raise ConfigError(problems)
    refuse_no_run(arguments.run)
    return arguments, gates


def export_command(argv: list[str]) -> dict[str, Any]:
    """Export a checkpoint of a run as the command line says; returns the answer for `--json`: where everything was written.

    Errors: those of `main`.
    """
    from launch.config.read_run import RunReader, read_run, split_allowing_arguments
    from trainer.session.base_files import pin_and_check_recorded_base

    allowing, argv_of_verb = split_allowing_arguments(argv)
    arguments, typed_gates = read_export_arguments(argv_of_verb)
    run_dir = arguments.run
    reader = RunReader(["export", *argv], uses=partial(_is_used_by_export, arguments))
    config = read_run(run_dir, reader, allowing)
    apply_export_arguments(config, arguments)

    # Everything that can refuse the export comes before the first file is written.
    averaged = []
    if arguments.average is not None:
        averaged = average.checkpoints_to_average(run_dir, arguments.average, config)
    gguf = export_gguf.gguf_request(arguments, config)
    bits = export_gguf.quantised_request(arguments, config)
    hub = export_hub.hub_target(arguments)
    last = averaged[-1] if averaged else find_checkpoint(run_dir, arguments.checkpoint, config.checkpoint)
    # Whether an earlier start of this command wrote everything but the GGUF file.
    only_convert = False
    if gguf is not None and bits is None and hub is None and arguments.to is not None:
        only_convert = export_gguf.lacks_only_gguf(Path(arguments.to).expanduser(), arguments, averaged or [last])
    export_directory = (
        hub.folder if hub is not None else export_destination(run_dir, arguments.to, holds_this_export=only_convert)
    )
    request = ExportRequest(
        run_dir,
        checkpoint=last,
        output_directory=export_directory,
        averaged_checkpoints=averaged,
        benchmarks=export_hub.parse_benchmark_data_sets(arguments.benchmarks or "{}"),
        checkpoint_choice=arguments.checkpoint,
    )
    if request.checkpoint_choice == "best":
        warn_if_training_did_not_help(run_dir, last, config)
    request.accepted_differences = pin_and_check_recorded_base(config, run_dir, arguments.accept, with_teacher=False)
    request.accepts_changed_data = "data" in arguments.accept
    if bits is not None:
        request.reason_to_read_rows = export_gguf.reason_to_read_rows(bits)
    for line in request.accepted_differences:
        print(f"accepted: {line}", flush=True)
    if bits is not None:
        export_gguf.refuse_unsupported_nf4_sizes(bits.kind, config)
    request.gate_verdicts = judge_gates(config, typed_gates, request)

    data = _write_and_record_export(config, request, arguments.processes or 1, is_written_already=only_convert)

    # What is made of the export: a GGUF file, a quantised model, a push to the hub.
    names = [path.name for path in averaged or [request.checkpoint]]
    answer: dict[str, Any] = {"run": str(run_dir), "checkpoints": names, "model": str(request.output_directory)}
    if gguf is not None:
        export_gguf.mark_gguf_missing(request.output_directory, arguments, averaged or [last])
        answer["gguf"] = str(
            export_gguf.write_and_verify_gguf(gguf, request.output_directory, verify=config.export.verify)
        )
        export_gguf.unmark_gguf_missing(request.output_directory)
    if bits is not None and data is not None:
        answer[str(bits.kind)] = str(export_gguf.write_quantised(bits, request.output_directory, data))
    if hub is not None:
        answer["pushed"] = export_hub.push_export_folder(hub)
    print_serve_commands(request.output_directory)
    return answer


def _write_and_record_export(
    config: RunConfig, request: ExportRequest, num_processes: int, *, is_written_already: bool
) -> PreparedData | None:
    """Write the model directory, register it in the tracker, and record in the run what the gates decided; prints each step.

    `is_written_already`: the directory holds this very export, and only lacks a GGUF file: it is left as it is, and not
    registered. Returns the run's data, or None if nothing needs it. Raises what `write_model_directory` raises.
    """
    from trainer.export.gates.judge import record_gate_decision

    print(_exporting_line(request), flush=True)
    data = None
    if is_written_already:
        print(f"the export in {request.output_directory} is whole: only its GGUF file is made", flush=True)
    else:
        data = write_model_directory(config, request, num_processes)
        register_in_tracker(config, request)
    # Recorded in `run.json`, so that one can see later why these weights were exported.
    if request.gate_verdicts is not None:
        export_record = {
            "to": str(request.output_directory),
            "checkpoint": request.checkpoint.name,
            "time": time.time(),
        }
        record_gate_decision(request.run_dir, request.gate_verdicts, export_record)
    print(f"model: {request.output_directory}")
    return data


def register_in_tracker(config: RunConfig, request: ExportRequest) -> None:
    """Register the export in a run's directory as a W&B artifact, if `logging.artifacts` asks for it.

    Only if the run left its export to a job (`export` in `launcher.pipeline`): any other run exports itself, and has
    registered that. Reads no checkpoint: after the export the run may have deleted it.
    """
    from trainer.config.launching import separate_job_writes_export
    from trainer.session.announcements import track_export

    is_in_run_dir = request.output_directory.resolve() == (request.run_dir / "export").resolve()
    if not config.logging.artifacts or not separate_job_writes_export(config) or not is_in_run_dir:
        return
    track_export(config, request.output_directory, request.trained_wandb_id, lambda line: print(line, flush=True))


def _is_used_by_export(arguments: ExportArguments, value: ValueNeedingConsent, config: RunConfig) -> bool:
    """Whether an export uses a value of the run's saved settings that reaches out of the run: a path, an address or a tracker.

    Somebody else may have written these settings: the user must allow what is used, and what is not used is left out.
    `value.settings`: the keys that have this value.
    - the run's answers for documents: unless the command line names others;
    - the cache and the source of the data: only with `bits=`, which measures its loss on rows;
    - else: what everything that only uses the model needs.
    """
    from launch.config.read_run import uses_model_alone

    if "export.answers" in value.settings:
        return arguments.answers is None
    if any(key in value.settings for key in ("data.cache_dir", "data.remote", "data.streaming")):
        return arguments.bits is not None
    return uses_model_alone(value, config)


def _exporting_line(request: ExportRequest) -> str:
    """The message that says what is exported where, with a remark if the run is not finished or trained on.

    "exporting runs/a/checkpoints/step-000100 to runs/a/export; the run ended at step 200"
    """
    if request.averaged_checkpoints:
        names = ", ".join(path.name for path in request.averaged_checkpoints)
        return f"exporting the mean of {names} to {request.output_directory}{unfinished_remark(request.run_dir, checkpoint=None)}"
    return f"exporting {request.checkpoint} to {request.output_directory}{unfinished_remark(request.run_dir, request.checkpoint)}"


def judge_gates(config: RunConfig, typed: dict[str, Any], request: ExportRequest) -> JudgedGates | None:
    """Judge the checkpoint by the gates of the run and those on the command line (`typed`); None if there are no gates.

    A gate is a bound on a metric that a model must keep to be exported, such as `eval/loss<2`. `gates.override=<why>` lets a
    checkpoint pass although one fails.

    Errors: ConfigError for a typed gate that contradicts the run's. GateRefused, unless there is an override, if a gate fails,
    or nothing was measured: of a mean of checkpoints, or on another base model.
    """
    from trainer.checkpoints.layout import checkpoint_dirs_of, checkpoints_in
    from trainer.export.gates.bounds import OVERRIDE_KEY
    from trainer.export.gates.judge import (
        GateRefused,
        exported_weights_at,
        judge_gates_of_weights,
        raise_if_gates_failed,
    )

    # A gate of the run was set before its results were known: a typed one may add to it, but not replace it.
    problems = []
    for name in typed.keys() & config.gates.keys() - {OVERRIDE_KEY}:
        if typed[name] != config.gates[name]:
            problems.append(
                f"gates: {name}: {typed[name]}: the run has {config.gates[name]}, which stays; "
                f"gates.{OVERRIDE_KEY}=<why> exports it all the same"
            )
    if problems:
        raise ConfigError(problems)
    gates = {**config.gates, **typed}
    if not gates.keys() - {OVERRIDE_KEY}:
        return None
    # Weights of which no metric was measured.
    if request.averaged_checkpoints and OVERRIDE_KEY not in gates:
        names = ", ".join(path.name for path in request.averaged_checkpoints)
        raise GateRefused(
            f"gates: nothing was measured of the mean of {names}; export one checkpoint, or say with gates.{OVERRIDE_KEY}=<why> "
            "why it may pass"
        )
    if request.accepted_differences and OVERRIDE_KEY not in gates:
        raise GateRefused(
            f"gates: nothing was measured of {request.checkpoint.name} on another base; leave accept out, or say with "
            f"gates.{OVERRIDE_KEY}=<why> why it may pass"
        )
    # A checkpoint of the run: by the metrics at its step.
    fallback_dir = config.checkpoint.fallback_dir
    checkpoints = checkpoints_in(checkpoint_dirs_of(request.run_dir, fallback_dir))
    step = next(step for step, path in checkpoints if path == request.checkpoint)
    gate_verdicts = judge_gates_of_weights(
        gates, exported_weights_at(request.run_dir, step, fallback_dir), config.evaluation.tasks
    )
    raise_if_gates_failed(gate_verdicts, f"{request.run_dir}, {request.checkpoint.name}")
    for line in gate_verdicts.failed_gate_lines:
        print(f"gate passed over ({gate_verdicts.override}): {line}", flush=True)
    return gate_verdicts


def apply_export_arguments(config: RunConfig, arguments: ExportArguments) -> None:
    """Put the settings of the command line into the run's configuration, in place; the export runs as one process on the CPU.

    Raises ConfigError for documents (`papers`: what the law asks for, from `answers` of the user) that cannot be written.
    """
    from strategies.base import SingleConfig
    from trainer.config.gates import document_problems
    from trainer.config.parallel import ParallelConfig
    from trainer.config.run import Device

    # Settings of `export.` that have an argument of their own; None: not typed.
    for name in ("merge", "dtype", "max_shard_gib", "verify", "papers", "answers"):
        typed = getattr(arguments, name)
        if typed is not None:
            setattr(config.export, name, typed)
    problems = [line.removeprefix("export.") for line in document_problems(config)]
    if problems:
        raise ConfigError(problems)
    # The host has more memory than a GPU, and values are only copied.
    config.strategy = SingleConfig()
    config.parallel = ParallelConfig()
    config.run.device = Device.cpu


def choose_checkpoint_again(request: ExportRequest, config: RunConfig) -> Path:
    """Choose another checkpoint to export, because the run, still training, deleted `request.checkpoint` after it was chosen.

    Raises ConfigError if there is no other, or if gates judged the deleted one: their verdict holds for no other.
    """
    if request.gate_verdicts is not None:
        raise ConfigError(
            f"checkpoint={request.checkpoint_choice}: {request.checkpoint.name} was deleted meanwhile, since the run is still "
            "training, and the gates judged it; start the same command again"
        )
    return find_checkpoint(request.run_dir, request.checkpoint_choice, config.checkpoint)


def write_model_directory(config: RunConfig, request: ExportRequest, num_processes: int) -> PreparedData | None:
    """Write the model directory of an export; returns the run's data, or None if nothing needs it.

    A run that still trains is kept from deleting the checkpoints until it is written. If the run deleted the checkpoint
    before, the choice is made again. Sets `checkpoint` and `trained_wandb_id` of the request. Raises what building the
    model, reading the checkpoint and writing raise.
    """
    from strategies.state import read_state_header
    from trainer.checkpoints.in_use import marked_as_in_use

    with ExitStack() as kept_checkpoints:
        for checkpoint in request.checkpoints():
            # A run deletes no checkpoint that is marked.
            kept_checkpoints.enter_context(marked_as_in_use(checkpoint))
        if not request.averaged_checkpoints and not request.checkpoint.is_dir():
            request.checkpoint = choose_checkpoint_again(request, config)
            kept_checkpoints.enter_context(marked_as_in_use(request.checkpoint))
        if config.logging.artifacts:
            request.trained_wandb_id = read_state_header(request.checkpoint).progress.wandb_id or ""
        job = _export_job(request)
        # Rows calibrate the quantised model (`bits=`), which this process makes afterwards: so it must have read them.
        if num_processes == 1 or request.reason_to_read_rows is not None:
            return writing.export_in_this_process(config, job)
        writing.export_in_processes(config, job, num_processes)
        return None


def _export_job(request: ExportRequest) -> writing.ExportJob:
    """What the processes that write an export are told: from which checkpoints, to where, and what the model card must say."""
    verdicts = request.gate_verdicts  # None without gates
    reason = request.reason_to_read_rows  # why `bits=` reads rows of the run; None without it
    return writing.ExportJob(
        run=str(request.run_dir),
        checkpoints=[str(path) for path in request.checkpoints()],
        to=str(request.output_directory),
        gates={} if verdicts is None else verdicts.as_json(),
        benchmarks=request.benchmarks,
        accepted=request.accepted_differences,
        reason_to_read_rows=None if reason is None else asdict(reason),
        accept_data=request.accepts_changed_data,
    )

"""`shardtune doctor --verify`: shows that the user's own settings compute what one process computes, on a small copy."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.doctor.verify_rank import CONFIG_FILE, PROGRESS_FILE, REPORT_FILE, REQUEST_FILE
from launch.output import TableColumn, TableRow, format_table, print_json, stdout_to_stderr, wrap_sentences
from strategies import exit_codes
from strategies.errors import ConfigError, ShardtuneError, key_of_problem

if TYPE_CHECKING:
    from trainer.config.run import RunConfig
    from trainer.verification.small_run import SmallRun

CHECKED_SETTINGS = (
    "model",
    "tuning",
    "objective",
    "strategy",
    "parallel",
    "precision",
    "run.device",
    "data.packing",
    "data.layout",
)
"""Settings whose problems refuse a verification. It needs neither data nor a budget nor a place for a run."""
LOG_FILE = "ranks.log"
NUM_SHOWN_LINES = 20
"""Lines of the ranks' own output that are shown if they ended without an answer."""


class VerificationFailed(ShardtuneError):
    """The ranks of a verification ended without an answer."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def verify(arguments: list[str], *, as_json: bool) -> int:
    """Check that a run as the settings (`arguments`) describe it computes what one process does, and print the report.

    One training step on a small copy of its model is compared. Returns the exit code: 69 if they differ, 130 after Ctrl-C.
    Errors: ConfigError for settings that cannot be compared, VerificationFailed if the ranks fail.
    """
    if not arguments:
        raise ConfigError(
            "--verify: needs the settings of a run, as in shardtune doctor --verify model.path=models/llama strategy=fsdp2"
        )
    with stdout_to_stderr(as_json), tempfile.TemporaryDirectory(prefix="shardtune-verify-") as directory:
        report = _run_verification(arguments, Path(directory))
    if report is None:
        return exit_codes.INTERRUPTED
    if as_json:
        print_json(report)
    else:
        print("\n".join(verification_lines(report)))
    return 0 if report["agrees"] else exit_codes.CHECK_FAILED


def _run_verification(arguments: list[str], directory: Path) -> dict[str, Any] | None:
    """Compare one step under the settings `arguments` with the same step in one process, on a small copy of the model.

    Writes the copy and some documents into `directory`, and starts the ranks there. Returns their report, with what was compared
    and what was changed for it; None after Ctrl-C.
    """
    config, changes = config_to_verify(arguments)
    from launch.config.compose import num_launched_ranks
    from trainer.verification.run import write_small_models_and_documents
    from trainer.verification.small_run import num_ranks_for_verification

    # As many as the settings ask for; None if they leave it open.
    user_ranks = num_launched_ranks(config)
    changes += move_to_cpus_without_gpus(config, num_ranks_for_verification(config))
    # Other libraries import DeepSpeed if it is installed. It would guess the device, and print its guess.
    os.environ.setdefault("DS_ACCELERATOR", str(config.run.device))
    print(f"making a small copy of {config.model.path}", file=sys.stderr, flush=True)
    model, small_run = write_small_models_and_documents(config, directory, user_ranks=user_ranks)
    rank_report = run_verifying_ranks(config, small_run, directory, user_ranks)
    if rank_report is None:
        return None
    return {
        "agrees": rank_report["agrees"],  # first in the JSON, for people
        "model": model.record(),
        "compared": compared_settings(config, small_run),
        "changes": [*changes, *small_run.changes],
        **rank_report,
    }


def config_to_verify(arguments: list[str]) -> tuple[RunConfig, list[str]]:
    """Compose the configuration to verify: (configuration, sentences on what was changed in it for the comparison).

    A device that is resolved from `auto` is no change: a run resolves it in the same way. Errors: ConfigError, also for
    strategy=single and strategy=auto, which leave nothing to compare.
    """
    from launch.config.compose import compose_config
    from strategies.base import Precision, StrategyName
    from trainer.config.run import Device, LauncherName
    from trainer.config.validate import config_problems

    config = compose_config(arguments, check=False).config
    problems = []
    if config.strategy.name is StrategyName.single:
        problems.append(
            "strategy=single: is the one process that --verify compares others with; add strategy=ddp, fsdp2, hsdp, zero1, "
            "zero2 or zero3"
        )
    elif config.strategy.name is StrategyName.auto:
        problems.append(
            "strategy=auto: becomes one of the others when the run starts; give --verify that one, as in strategy=fsdp2"
        )
    else:
        problems += [
            problem for problem in config_problems(config) if key_of_problem(problem).startswith(CHECKED_SETTINGS)
        ]
    if problems:
        raise ConfigError(problems)
    notes = []
    if config.launcher.name is not LauncherName.local:
        notes.append(f"launcher={config.launcher.name}: compared on this host, on its own devices")
    if config.run.device is Device.auto:  # a launcher of other hosts leaves it open
        import torch

        config.run.device = Device.cuda if torch.cuda.is_available() else Device.cpu
        config.substitutions["run.device"] = f"auto -> {config.run.device}"
    if config.precision is Precision.auto:
        config.precision = Precision.bf16
        notes.append("precision=auto -> bf16")
    return config, notes


def move_to_cpus_without_gpus(config: RunConfig, ranks: int) -> list[str]:
    """Let the comparison run on CPUs if there are fewer GPUs than ranks: changes `config`, and returns sentences on the changes.

    Errors: ConfigError if run.device=cuda was given by the user and there are too few GPUs.
    """
    from strategies.base import Precision
    from trainer.config.run import Device
    from trainer.model.config import Attention

    if config.run.device is Device.cpu:
        return []
    import torch

    gpus = torch.cuda.device_count()
    if gpus >= ranks:
        return []
    if "run.device" not in config.substitutions:  # not resolved from auto: the user has set it
        raise ConfigError(
            f"run.device=cuda: --verify takes {ranks} ranks with a GPU each, and this host has {gpus}; leave run.device out "
            "to compare on CPUs"
        )
    plural = "s" if gpus != 1 else ""
    notes = [f"run.device -> cpu: {ranks} ranks are compared, and this host has {gpus} GPU{plural}"]
    config.run.device = Device.cpu
    if config.model.attention in (Attention.flash_attention_2, Attention.flex):
        notes.append(f"model.attention={config.model.attention} -> auto: it runs on GPUs alone")
        config.model.attention = Attention.auto
    if config.precision is Precision.fp16:
        notes.append("precision=fp16 -> bf16: DeepSpeed has no fp16 on CPUs")
        config.precision = Precision.bf16
    return notes


def run_verifying_ranks(
    config: RunConfig, small_run: SmallRun, directory: Path, user_ranks: int | None
) -> dict[str, Any] | None:
    """Start the ranks that compare the copy of the run in `directory`; returns rank 0's report as JSON values, None after Ctrl-C.

    `config`: the run's.
    `small_run`: its small copy.
    `user_ranks`: the ranks that the settings ask for; None if that is open.

    Writes configuration and request into `directory`, where the ranks read them. Errors: VerificationFailed if a rank failed
    before there was a report.
    """
    from launch.cluster.torchrun import RankProgram, RedirectedOutput, run_ranks_on_this_host
    from launch.config.frozen import config_sha256, config_yaml
    from trainer.reporting.status import message_suffices, read_failure

    # What the ranks read.
    sha256 = config_sha256(config)
    (directory / CONFIG_FILE).write_text(f"# sha256: {sha256}\n{config_yaml(config)}", encoding="utf-8")
    request = {"user_ranks": user_ranks, "timeout_s": small_run.config.run.timeout_s}
    (directory / REQUEST_FILE).write_text(json.dumps(request), encoding="utf-8")
    print(f"starting {small_run.ranks} processes", file=sys.stderr, flush=True)
    progress = _Progress(directory / PROGRESS_FILE)
    output = RedirectedOutput(directory / LOG_FILE, progress.poll)
    program = RankProgram("launch.doctor", CONFIG_FILE)
    ranks_end = run_ranks_on_this_host(small_run.config, directory, sha256[:8], output, program=program)
    if ranks_end.exit_code == exit_codes.INTERRUPTED:
        return None
    # The report, else why there is none.
    if (directory / REPORT_FILE).exists():
        report: dict[str, Any] = json.loads((directory / REPORT_FILE).read_text(encoding="utf-8"))
        return report
    failure = read_failure(directory)
    if message_suffices(failure):
        raise VerificationFailed(failure["message"], failure["exit_code"])
    lines = (directory / LOG_FILE).read_text(encoding="utf-8", errors="replace").splitlines()
    reason = failure.get("traceback") or "\n".join(lines[-NUM_SHOWN_LINES:])
    who = f"rank {failure['rank']}" if failure else "the ranks"
    message = f"{reason.rstrip()}\n--verify: {who} failed before there was anything to compare"
    raise VerificationFailed(message, exit_codes.FAILED)


class _Progress:
    """Shows the user how far the verification is: prints the lines that rank 0 adds to its progress file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_printed = 0

    def poll(self) -> None:
        """Print the complete lines that were added since the last call."""
        if not self.path.exists():
            return
        *complete_lines, _ = self.path.read_text(encoding="utf-8").split("\n")
        for line in complete_lines[self.num_printed :]:
            print(f"  {line}", file=sys.stderr, flush=True)
        self.num_printed = len(complete_lines)


def compared_settings(config: RunConfig, small_run: SmallRun) -> dict[str, Any]:
    """The settings under which the run is compared, as JSON values for the report.

    `config`: the run's, for what the small copy takes over.
    `small_run`: the copy that is really run, for what it makes smaller (ranks, degrees of parallelism, batches) or resolves
    (recomputation).
    """
    small_config = small_run.config
    return {
        "ranks": small_run.ranks,
        "device": str(config.run.device),
        "strategy": str(config.strategy.name),
        "sequence": small_config.parallel.sequence,
        "experts": small_config.parallel.experts,
        "tuning": str(config.tuning.name),
        "objective": str(config.objective.name),
        "precision": str(config.precision),
        "recomputation": str(small_config.strategy.activation_checkpointing),
        "documents_per_micro_batch": small_config.batch["micro"],
        "micro_batches": small_run.accumulation,
    }


def verification_lines(report: dict[str, Any]) -> list[str]:
    """Write the report of a verification for people, as lines.

    It reads of the report: "kernels", what computes attention in each pass ({"one process, fp32": "sdpa", ...}); "notes" and
    "problems", lists of messages; and "agrees", a bool.
    """
    lines = [*_summary_lines(report), "", *_difference_lines(report), "", "kernels of each pass:"]
    passes = report["kernels"]
    if len(set(passes.values())) == 1:
        passes = {"every pass": next(iter(passes.values()))}
    rows = [TableRow((name, kernels)) for name, kernels in passes.items()]
    lines += format_table((TableColumn(), TableColumn()), rows, indent=2)
    for title in ("notes", "problems"):
        if report[title]:
            lines += ["", f"{title}:", *wrap_sentences(report[title])]
    if report["agrees"]:
        lines += ["", "the run computes what one process computes"]
    return lines


def _summary_lines(report: dict[str, Any]) -> list[str]:
    """Write lines on what is compared, and on which copy of the model.

    It reads of the report:
    - "model": {"model_type": "llama", "elements": 100000, "kept": {"heads": 4}, "changed": {"layers": {"model": 32, "copy": 2}}},
      with the number of parameters as "elements";
    - "compared": the settings under which the run is compared, such as {"ranks": 2, "strategy": "fsdp2", ...};
    - "differences": a list of {"precision": "fp32", ...};
    - "changes": sentences on settings of the run that the comparison changes.
    """
    model = report["model"]
    compared = report["compared"]
    kept_sizes = ", ".join(f"{name} {number}" for name, number in model["kept"].items())
    shrunk_sizes = ", ".join(f"{name} {sizes['model']} -> {sizes['copy']}" for name, sizes in model["changed"].items())
    precisions = list(dict.fromkeys(difference["precision"] for difference in report["differences"]))
    parallel_settings = ""
    for name in ("sequence", "experts"):
        if compared[name] > 1:  # 1 means that there is no such parallelism
            parallel_settings += f" parallel.{name}={compared[name]}"
    rows = [
        ("model", f"a small copy of this {model['model_type']}, {model['elements']:,} parameters"),
        ("kept", kept_sizes or "no number of heads or experts"),
        ("shrunk", shrunk_sizes or "nothing"),
        (
            "compared",
            f"strategy={compared['strategy']} tuning={compared['tuning']} objective={compared['objective']}"
            f"{parallel_settings} on "
            f"{compared['ranks']} ranks ({compared['device']}), {compared['micro_batches']} micro-batches of "
            f"{compared['documents_per_micro_batch']}, recomputation {compared['recomputation']}",
        ),
        ("with", f"one process, in {' and '.join(precisions)}"),
    ]
    rows += [("changed", change) for change in report["changes"]]
    return format_table((TableColumn(), TableColumn()), [TableRow(row) for row in rows])


def _difference_lines(report: dict[str, Any]) -> list[str]:
    """Write the table of differences: a row for each quantity, and two columns for each precision: the difference and its bound.

    A quantity is the loss, or a kind of parameter whose gradients are compared; each has all precisions, in one order.
    report["differences"]: [{"quantity": "loss", "precision": "fp32", "distance": 1e-6, "bound": 1e-4, "exceeded": False}, ...].
    """
    precisions = list(dict.fromkeys(difference["precision"] for difference in report["differences"]))
    columns = [TableColumn("largest difference of")]
    for precision in precisions:
        columns += [TableColumn(precision, is_number=True), TableColumn("at most", is_number=True)]
    columns.append(TableColumn())
    cells_by_quantity: dict[str, list[str]] = {}
    differing_quantities = set()
    for difference in report["differences"]:
        cells = cells_by_quantity.setdefault(difference["quantity"], [])
        cells += [_distance_text(difference["distance"]), _distance_text(difference["bound"])]
        if difference["exceeded"]:
            differing_quantities.add(difference["quantity"])
    rows = []
    for quantity, cells in cells_by_quantity.items():
        rows.append(TableRow((quantity, *cells, "differs" if quantity in differing_quantities else "")))
    return format_table(columns, rows)


def _distance_text(distance: float | str | None) -> str:
    """A distance or bound as a cell: 1e-6 -> "1.0e-06", None -> "no gradient", a text as it is."""
    if distance is None:
        return "no gradient"
    return distance if isinstance(distance, str) else f"{distance:.1e}"

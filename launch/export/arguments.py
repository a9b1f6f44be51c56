"""The arguments of `shardtune export`, and what runs and adapters share: the target directory and the record of the run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.config.output_directory import require_output_directory
from launch.config.verb_arguments import VerbArguments, flag, forwarded_settings, option, positional
from strategies.errors import ConfigError
from trainer.export.config import ExportType
from trainer.export.gguf import GgufType
from trainer.reporting.run_record import RUN_RECORD, RunRecord, read_run_record

HUB = "to=hub:"
"""The argument that pushes to the hub, up to the repository's name."""


@dataclass(kw_only=True)
class ExportArguments(VerbArguments):
    """What `shardtune export <run>` takes."""

    run: Path = positional("name the directory of one run, as in shardtune export runs/x")
    checkpoint: str = option(
        "which checkpoint: the one that the run exported at its end (auto), last, best or a step", default="auto"
    )
    average: str | None = option(
        "export the mean of several checkpoints: last:<n>, or steps such as [100,200]", example="last:3"
    )
    to: str | None = option(
        "a new or empty directory, or hub:<owner>/<name>; default: <run>/export, which is replaced if it exists",
        example="<directory>",
    )
    merge: bool | None = option("merge the adapter into the base and write a whole model", example="true")
    dtype: ExportType | None = option(
        "data type of a whole model: auto, float32, bfloat16, float16", example="bfloat16"
    )
    max_shard_gib: float | None = option("size of the largest safetensors file, in GiB", example="5", above=0)
    verify: bool | None = option(
        "reload the export and compare its logits with those of the trained model; --verify does the same",
        example="true",
        aliases=("--verify",),
    )
    processes: int | None = option(
        "processes of this host that write a whole model, each its own files; default: 1",
        key="launcher.processes",
        example="4",
        above=0,
    )
    accept: list[str] = option(
        "continue although the base model (with bits=, also the data) is not that of the training",
        default=[],
        example="[base]",
        choices=("base", "data"),
    )
    papers: list[str] | None = option(
        "documents to write beside the model card (docs/papers.md)", example="[datasheet,annex_xi]"
    )
    answers: str | None = option("your answers for these documents: what only the owner knows", example="<file.yaml>")
    gates: list[str] = forwarded_settings(required_prefix="gates")
    hub_private: bool = option(
        "whether the repository on the hub is private", key="hub.private", default=True, needs=HUB
    )
    benchmarks: str | None = option(
        "the hub data set of each evaluation task, for the model card", example="{task: <owner>/<data set>}"
    )
    gguf: GgufType | None = option("also write a GGUF file: f32, f16, bf16 or q8_0", example="q8_0")
    gguf_converter: str | None = option(
        "path of llama.cpp's converter", key="gguf.converter", example="<convert_hf_to_gguf.py>", needs="gguf"
    )
    gguf_python: str | None = option(
        "the Python that runs the converter", key="gguf.python", example="<python>", needs="gguf"
    )
    bits: str | None = option(
        "also write a quantised model: nf4, int8, torchao_int8, torchao_nvfp4, llmcompressor_w4a16, llmcompressor_w8a8, "
        "llmcompressor_fp8",
        example="nf4",
    )
    bits_python: str | None = option(
        "the Python of the environment that has llmcompressor",
        key="bits.python",
        example="<python>",
        needs="bits=llmcompressor_",
    )
    dry_run: bool = flag("write the folder for the hub and push nothing", needs=HUB)
    as_json: bool = flag("print where everything is as JSON, for a script; messages go to stderr", key="--json")


def read_gates(arguments: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Read the gates among the arguments of `export`; returns (bounds by metric, a problem for each argument that is no gate)."""
    from trainer.export.gates.bounds import gate_problems, parse_gate_argument

    gates: dict[str, Any] = {}
    unusable: list[str] = []
    for gate_argument in arguments:
        try:
            typed_gates = parse_gate_argument(gate_argument)
        except ConfigError as error:
            unusable += error.problems
            continue
        unusable += gate_problems(typed_gates)
        gates |= typed_gates
    return gates, unusable


def refuse_no_run(directory: Path) -> None:
    """Raise ConfigError for a directory that holds no run, or that does not exist."""
    if not (directory / "config.yaml").is_file():
        what = "not a run directory (it has no config.yaml)" if directory.exists() else "there is no such directory"
        raise ConfigError(f"{directory}: {what}; name a run, as in shardtune export runs/x")


def export_destination(run_dir: Path, to: str | None, *, holds_this_export: bool = False) -> Path:
    """Choose the directory that an export is written to: `to`, or `export` in the run directory if that is None.

    `holds_this_export`: whether `to` holds this very export already. Otherwise raises ConfigError if `to` exists and is not an
    empty directory. A file is refused in any case.
    """
    if to is None:
        return run_dir / "export"
    path = Path(to).expanduser()
    require_output_directory(path)
    is_free = not path.exists() or (path.is_dir() and not any(path.iterdir()))
    if not is_free and not holds_this_export:
        raise ConfigError(f"to={path}: exists and is not empty; name a new directory")
    return path


def unfinished_remark(run_dir: Path, checkpoint: Path | None) -> str:
    """A remark to append to the message about an export, since the user may export too early, or an old checkpoint.

    - the run is not done: "; the run is not done: preempted", or its reason if it has one;
    - the run is done, and trained on after `checkpoint`: "; the run ended at step 200";
    - else, and for a mean of checkpoints (`checkpoint` is None) of a run that is done: "".
    """
    from trainer.reporting.status import RunState, read_status

    status = read_status(run_dir)
    if status.get("state") != RunState.done:
        return f"; the run is not done: {status.get('reason') or status.get('state')}"
    last_step = status.get("step")
    if checkpoint is None or not isinstance(last_step, int):
        return ""
    # The directory is called step-000200.
    checkpoint_step = int(checkpoint.name.rpartition("-")[2])
    return f"; the run ended at step {last_step}" if last_step > checkpoint_step else ""


def required_run_record(run_dir: Path) -> RunRecord:
    """The record of a run (run.json), which an export cannot do without. Raises ConfigError if it cannot be read."""
    try:
        return read_run_record(run_dir)
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"{run_dir / RUN_RECORD}: cannot be read ({error}), and the precision and the card of an export come from it; "
            "bring it back"
        ) from None

"""Measures the points of an experiment in this process, and keeps each run in a JSON file as soon as it has ended.

Imports are paid once for all runs. Time is the CPU seconds of this process, which has one thread.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
import re
import shutil
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.course import data
from benchmarks.course.experiments import Experiment

RESULTS = Path(__file__).resolve().parents[1] / "results" / "course"
OWN_WORDS = (
    "run.device=cpu",
    "run.threads=1",
    "run.matmul=blas",
    "strategy=single",
    "launcher.processes=1",
    "logging.wandb=disabled",
    "logging.report=false",
    "logging.every_steps=1",
    "checkpoint.save_final=false",
    "export.at_end=false",
    "data.privacy.mode=none",
    "data.duplicates.exact=none",
    "data.duplicates.normalized=none",
)
"""Settings that change how a run is made here, and not what it learns. The words of an experiment win over them."""

Row = dict[str, Any]


def measure_experiment(
    experiment: Experiment,
    seeds: Sequence[int],
    work: Path,
    *,
    results: Path = RESULTS,
    train: Callable[[Path, list[str]], Row] | None = None,
) -> int:
    """Make the runs that `results` lacks, keep them, then compare all; returns how many failed.

    `work`: where data and runs go. `train`: makes one run and returns its numbers; default: `train_run`.
    """
    train = train or train_run
    directory = work / experiment.name
    directory.mkdir(parents=True, exist_ok=True)
    path = results / f"{experiment.name}.json"
    record = read_record(path)
    experiment.prepare(directory, seeds)
    failures = 0
    # Seed by seed, so that an interrupted experiment has every point with the seeds that it has.
    for seed in seeds:
        for point in experiment.points:
            words = experiment.words_of(point, seed)
            kept = record["points"].setdefault(point, {}).get(str(seed))
            if kept is not None and kept["words"] == words and "failed" not in kept:
                continue
            run = run_directory(directory, point, seed)
            if kept is not None and kept["words"] != words:
                remove_run(run)
            if experiment.measure is not None:
                row = {"words": words, **experiment.measure(point, seed, directory)}
            else:
                row = {"words": words, "identity": identity_of(words, directory)}
                shared = same_run(row["identity"], run, results, work) if experiment.look is None else None
                row |= shared or measure_point(experiment, run, data.with_paths(words, directory), train)
            failures += "failed" in row
            record["points"][point][str(seed)] = row
            write_record(path, record)
            print(f"{experiment.name}, {point}, seed {seed}: {summary(row)}", flush=True)
    # In the order of the experiment, and without points that it no longer has.
    record["points"] = {point: record["points"].get(point, {}) for point in experiment.points}
    write_record(path, record)
    compare_runs(experiment, seeds, directory, results / experiment.name)
    return failures


def identity_of(words: list[str], directory: Path) -> str:
    """What decides the result of a run: SHA-256 of its settings, in which the content of a file of data stands for its path."""
    settings = dict(word.split("=", 1) for word in words)
    for key, value in settings.items():
        path = directory / value.removeprefix("{data}/")
        if value.startswith("{data}/") and path.is_file():
            settings[key] = hashlib.sha256(path.read_bytes()).hexdigest()
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def same_run(identity: str, run: Path, results: Path, work: Path) -> Row | None:
    """The numbers of the same run in another experiment, whose directory then stands for `run`; None if there is none.

    Experiments share their simplest point.
    """
    for path in sorted(results.glob("*.json")):
        for point, runs in read_record(path)["points"].items():
            for seed, row in runs.items():
                other = run_directory(work / path.stem, point, int(seed))
                is_same = row.get("identity") == identity and "failed" not in row
                if is_same and other.is_dir() and other != run:
                    remove_run(run)
                    run.parent.mkdir(parents=True, exist_ok=True)
                    run.symlink_to(other.resolve())
                    return {key: value for key, value in row.items() if key != "words"}
    return None


def remove_run(run: Path) -> None:
    """Remove a run directory, or the link that stands for it."""
    if run.is_symlink():
        run.unlink()
    shutil.rmtree(run, ignore_errors=True)


def measure_point(experiment: Experiment, run: Path, words: list[str], train: Callable[[Path, list[str]], Row]) -> Row:
    """One run; `{"failed": reason}` if it did not end well.

    A run that is done, and was not kept because the command was interrupted, is only read: its time is not known then.
    """
    from launch.config.frozen import is_finished

    was_finished = is_finished(run)
    if not was_finished:
        remove_run(run)
    began = time.process_time()
    try:
        row = train(run, words)
        if experiment.look is not None:
            row |= experiment.look(run)
    except Exception as error:  # noqa: BLE001 - one run that fails must not cost the others
        remove_run(run)
        return {"failed": f"{type(error).__name__}: {error}"}
    # The weights of every run together would fill a disk.
    for large in ("export", "checkpoints"):
        shutil.rmtree(run / large, ignore_errors=True)
    return row if was_finished else row | {"cpu_s": round(time.process_time() - began, 1)}


def train_run(run: Path, words: list[str]) -> Row:
    """Train in this process. Its screen goes into a file beside the run. Returns `numbers_of` the run."""
    from launch.main import main

    places = (f"run.dir={run}", f"data.cache_dir={run.parents[1] / 'cache'}")
    settings = dict(word.split("=", 1) for word in (*OWN_WORDS, *places, *words))
    run.parent.mkdir(parents=True, exist_ok=True)
    screen = run.with_name(f"{run.name}.txt")
    with screen.open("w", encoding="utf-8") as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        code = main(["train", *(f"{key}={value}" for key, value in settings.items())])
    if code:
        raise RuntimeError(f"exit code {code}, see {screen}")
    return numbers_of(run)


def numbers_of(run: Path) -> Row:
    """The numbers of a finished run: of its last evaluation (`eval/loss`), of the one before training (`before/eval/loss`),
    the lowest held-out loss and its step (`best/eval/loss`, `best/step`), and what the last step and its gradients were.
    """
    from trainer.reporting.metric_rows import METRICS_FILE, read_rows

    rows = read_rows(run / METRICS_FILE).rows
    steps = [row for row in rows if "loss" in row]
    evaluations = [row for row in rows if any(key.startswith("eval/") for key in row)]
    numbers: Row = {"steps": max(row["step"] for row in steps), "train_loss": rounded(steps[-1]["loss"])}
    clipped = [row for row in steps if row.get("grad_norm", 0) > 1]
    numbers["clipped_share"] = rounded(len(clipped) / len(steps))
    for prefix, row in (("before/", evaluations[0]), ("", evaluations[-1])):
        if prefix and row["step"] > 0:
            continue
        for key, value in row.items():
            if key.startswith(("eval/", "forgetting")) and isinstance(value, int | float):
                numbers[f"{prefix}{key}"] = rounded(value)
    with_loss = [row for row in evaluations if "eval/loss" in row]
    best = min(with_loss, key=lambda row: row["eval/loss"])
    numbers["best/eval/loss"] = rounded(best["eval/loss"])
    numbers["best/step"] = best["step"]
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    numbers["trainable_parameters"] = record["sharding"]["trainable_parameters"]
    return numbers


def rounded(value: float) -> float:
    """Six significant digits: more would differ from one machine to the next."""
    return float(f"{value:.6g}")


def run_directory(directory: Path, point: str, seed: int) -> Path:
    """Where the run of a point is, by a name that reads well in a comparison."""
    name = "".join(letter if letter.isalnum() or letter in ".-" else "-" for letter in point)
    return directory / "runs" / f"{name}-seed{seed}"


def compare_runs(experiment: Experiment, seeds: Sequence[int], directory: Path, to: Path) -> None:
    """Keep `shardtune compare` of all runs, if they are still there; without plots, which would be a megabyte each."""
    runs = [run_directory(directory, point, seed) for point in experiment.points for seed in seeds]
    finished = [str(run) for run in runs if (run / "run.json").is_file()]
    if len(finished) < len(runs):
        return
    from launch.compare.answer import comparison_markdown
    from launch.compare.command import point_sources_from_arguments
    from launch.compare.comparison import compare_points
    from launch.config.prices import gpu_hour_price

    rows, problems = point_sources_from_arguments(finished)
    if problems:
        raise RuntimeError("; ".join(problems))
    to.mkdir(parents=True, exist_ok=True)
    text = without_directories(comparison_markdown(compare_points(rows, gpu_hour_price)))
    (to / "compare.md").write_text(text, encoding="utf-8")


def without_directories(text: str) -> str:
    """A text with names of files in place of the paths of this machine, some of which a table has shortened."""
    text = re.sub(r"(?<![\w.:/])/(?:[\w.+-]+/)+(?=[\w.+-])", "", text)
    return re.sub(r"(?<![\w.])/\S*\.\.\.", "...", text)


def read_record(path: Path) -> dict[str, Any]:
    """What is kept of an experiment; an empty record of this machine if nothing is."""
    if path.is_file():
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return record
    packages = ("torch", "transformers", "peft")
    return {
        "hardware": f"{processor()}, one thread",
        "versions": {package: version(package) for package in packages},
        "points": {},
    }


def processor() -> str:
    """The name of the processor, as Linux has it; elsewhere the kind of machine."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Replace the file in one step: a kill leaves the earlier one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def summary(row: Row) -> str:
    """A run in one line, for the screen."""
    if "failed" in row:
        return f"failed: {row['failed']}"
    shown = {key: value for key, value in row.items() if key in ("eval/loss", "eval/accuracy", "steps", "cpu_s")}
    return ", ".join(f"{key} {value}" for key, value in shown.items())

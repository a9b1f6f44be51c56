"""Submits runs to SLURM: copies the code, writes the scripts, calls `sbatch`, and reports the job.

Every refusal of `sbatch` is passed on. A job that can never start is refused first (`launch/cluster/advice.py`).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from launch.cluster import advice, containers, pipeline, snapshot
from launch.cluster.sbatch_environment import refuse_gpus_of_environment, sbatch_environment, sort_variables
from launch.cluster.slurm import head, job_name, render
from launch.runs.queue import note_submitted
from strategies.errors import ConfigError, StorageError
from trainer.config.resuming import flat, plain
from trainer.config.run import Code, RunConfig, SlurmConfig
from trainer.reporting.code_revision import ROOT, revision
from trainer.reporting.status import write_text_atomic

if TYPE_CHECKING:
    from launch.config.frozen import Composed

JOB_ID = re.compile(r"\d+(;.*)?")
"""What `sbatch --parsable` prints of a job."""


@dataclass(frozen=True, slots=True)
class Submitted:
    """What SLURM took: a job, an array or a chain."""

    jobs: dict[str, str]
    """Job ids by part: train, and those of `launcher.pipeline`."""
    runs: list[str]
    """Run directories; those of an array in the order of its tasks."""
    scripts: dict[str, str]
    code: str | None
    """The copy of the code that the jobs run, or the clone; None where nothing was left to submit."""


def submit(config: RunConfig, run_dirs: list[Path], *, print_only: bool) -> list[Submitted]:
    """Write the scripts into the run directories and submit them; with `print_only` show them instead, and return nothing.

    Several runs are one job array, or with `launcher.pipeline` a chain each. Raises ConfigError with the words of `sbatch`, and
    StorageError where something cannot be written.
    """
    slurm = config.launcher
    if isinstance(slurm, SlurmConfig) and slurm.pipeline and len(run_dirs) > 1:
        return [chain for run_dir in run_dirs for chain in submit(config, [run_dir], print_only=print_only)]
    copied = isinstance(slurm, SlurmConfig) and slurm.code is Code.snapshot
    code = snapshot.place_of(run_dirs[0], snapshot.digest(snapshot.read())) if copied and run_dirs else ROOT
    scripts = scripts_of(config, run_dirs, code)
    if print_only:
        assert isinstance(slurm, SlurmConfig)
        for line in advice.ranks_lines(slurm):
            print(f"# {line}", file=sys.stderr)
        for number, (part, text) in enumerate(scripts.items()):
            if len(scripts) > 1:
                after = (
                    f" --dependency=afterok:<job of {[*scripts][number - 1]}> --kill-on-invalid-dep=yes"
                    if number
                    else ""
                )
                print(f"# ---- {part}: sbatch{after} {part}.sbatch")
            print(text, end="")
        return []
    assert isinstance(slurm, SlurmConfig)
    if slurm.gpu_request is None:
        refuse_gpus_of_environment()
    said = [*advice.advise(config, run_dirs), *environment_lines(scripts["train"])]
    if containers.way_of(launcher := plain(config)["launcher"]) is not None:
        if containers.way_of(launcher) == "pyxis":
            containers.refuse_missing(launcher)  # apptainer may be on the nodes alone; each of them is asked
        Path(config.data.cache_dir).expanduser().mkdir(parents=True, exist_ok=True)  # is mounted
    if copied:
        snapshot.take(run_dirs[0])
    written: dict[str, Path] = {}
    try:
        for run in run_dirs:
            # Older SLURM fails a job without a word where the directory of its output is missing.
            (run / "logs").mkdir(parents=True, exist_ok=True)
            for part, text in scripts.items():
                write_text_atomic(run / f"{part}.sbatch", text)
                written.setdefault(part, run.absolute() / f"{part}.sbatch")
    except OSError as error:
        raise StorageError(f"cannot write the job script: {error}; choose another run.dir") from error
    jobs = pipeline.submit_chain(written, run_dirs[0], sbatch)
    job = dict(jobs)["train"]
    with contextlib.suppress(StorageError):  # SLURM has it; the script in its directory tells too
        note_submitted(run_dirs, job)
    print(f"submitted job {job}: {written['train']}")
    if len(jobs) > 1:
        print(pipeline.table(jobs, config, run_dirs[0]))
    print(*(f"  {line}" for line in [f"code    {said_of(code, copied=copied)}", *said]), sep="\n")
    _tell(slurm, run_dirs, job)
    paths = {part: str(path) for part, path in written.items()}
    return [Submitted(dict(jobs), [str(run.absolute()) for run in run_dirs], paths, str(code))]


def scripts_of(config: RunConfig, run_dirs: list[Path], code: Path) -> dict[str, str]:
    """The text of each job's script, by its part. Raises ConfigError."""
    slurm = config.launcher
    if not isinstance(slurm, SlurmConfig) or not slurm.pipeline:
        return {"train": render(config, run_dirs, clone=code)}

    def begin(own: RunConfig, runs: list[Path]) -> list[str]:
        return head(own, runs, clone=code)

    texts = {part: pipeline.script_of(config, part, run_dirs[0], begin) for part in slurm.pipeline if part != "train"}
    return {
        part: texts.get(part) or render(pipeline.train_of(config, run_dirs[0]), run_dirs, clone=code)
        for part in slurm.pipeline
    }


def _tell(slurm: SlurmConfig, run_dirs: list[Path], job: str) -> None:
    name = slurm.job_name or job_name([str(run.absolute()) for run in run_dirs])
    print(f"  queue   squeue --job {job}")
    print(
        f"  log     tail -F {shlex.quote(str(run_dirs[0] / 'logs' / f'{name}-{job}-0.log'))}"
        if len(run_dirs) == 1
        else f"  logs    below {', '.join(shlex.quote(str(run / 'logs')) for run in run_dirs)}"
    )
    print(f"  save and requeue now: scancel --batch --signal=USR2 {job}")
    print(
        f"  save and end: shardtune stop {shlex.quote(str(run_dirs[0])) if len(run_dirs) == 1 else '<one of the runs>'}"
    )


def environment_lines(script: str) -> list[str]:
    """Which `SBATCH_*` of the environment reach sbatch with this script, for people; within a job none does."""
    return [] if "SLURM_JOB_ID" in os.environ else sort_variables(script).lines()


def said_of(code: Path, *, copied: bool) -> str:
    """Which code a job will run, for people."""
    at = f" at {found}" if (found := revision()) else ""
    if copied:
        return f"{code}: a copy of the code{at}; later changes do not reach the job"
    return f"{code}{at}, as it is whenever the job starts (launcher.code=clone)"


def sbatch(script: Path, options: list[str]) -> str:
    """Submit; returns the job id. Raises ConfigError with what `sbatch` says."""
    env = sbatch_environment(script.read_text(encoding="utf-8"))
    try:
        done = subprocess.run(
            ["sbatch", "--parsable", *options, str(script)], env=env, capture_output=True, text=True, errors="replace"
        )
    except FileNotFoundError:
        raise ConfigError(
            "launcher=slurm needs the command sbatch, which is not on PATH here: "
            f"submit {script} on a login node, or use launcher=local"
        ) from None
    if done.returncode:
        lines = [line.removeprefix("sbatch: error: ") for line in (done.stderr or done.stdout).strip().splitlines()]
        raise ConfigError(
            f"sbatch refused {script}: {'; '.join(lines)}; what it asks for is launcher.* (docs/slurm.md)"
        )
    return job_id(done.stdout, script)


def job_id(answer: str, script: Path) -> str:
    """The id in what `sbatch --parsable` prints; a site may print words of its own before and after. Raises ConfigError."""
    ids = [line.strip() for line in answer.splitlines() if JOB_ID.fullmatch(line.strip())]
    if len(ids) != 1:
        words = " ".join(answer.split()) or "nothing"
        raise ConfigError(
            f"sbatch took {script}, but no job id is in what it printed: {words}; the job may be in the queue: squeue --me"
        )
    return ids[0].partition(";")[0]  # "id" or "id;cluster"


def submit_array(composed: list[Composed], run_dirs: list[Path]) -> int:
    """Freeze the runs and submit those that are not finished, nor in the queue; returns 0.

    One job array for all that ask for the same.
    """
    from launch.cluster.array_size import refuse_large_array
    from launch.config.frozen import is_finished
    from launch.runs.freeze import freeze, queued_as_asked

    left = []
    if not getattr(composed[0].config.launcher, "pipeline", []):
        everything = by_request(list(zip(composed, run_dirs, strict=True)))
        refuse_large_array(max(len(alike) for alike in everything))
    for one, run_dir in zip(composed, run_dirs, strict=True):
        if (job := queued_as_asked(one, run_dir)) is not None:
            print(f"{run_dir}: {job.says}; not submitted again")
            continue
        finished = is_finished(run_dir)
        freeze(one, run_dir)
        if finished:
            print(f"{run_dir}: already finished with this configuration; nothing to do")
        else:
            left.append((one, run_dir))
    for alike in by_request(left):
        submit(alike[0][0].config, [run_dir for _, run_dir in alike], print_only=False)
    return 0


def by_request(runs: list[tuple[Composed, Path]]) -> list[list[tuple[Composed, Path]]]:
    """The runs, those together that ask for the same job: all tasks of an array are alike."""
    groups: dict[str, list[tuple[Composed, Path]]] = {}
    for one, run_dir in runs:
        asked = {key: value for key, value in flat(plain(one.config)).items() if key.startswith("launcher.")}
        groups.setdefault(json.dumps([asked, one.config.run.timeout_s], sort_keys=True), []).append((one, run_dir))
    return list(groups.values())

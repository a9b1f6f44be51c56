"""Submits runs to SLURM: copies the code, writes the scripts, calls `sbatch`, and reports the job.

Every refusal of `sbatch` is passed on. A job that can never start is refused first (`launch/cluster/advice.py`).
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from launch.cluster import advice, containers, pipeline, snapshot
from launch.cluster.sbatch_environment import refuse_gpus_of_environment, sbatch_environment, sort_sbatch_variables
from launch.cluster.slurm import default_job_name, render_train_script, script_head_lines
from launch.runs.queue import write_submitted_job_ids
from strategies.errors import ConfigError, StorageError
from trainer.config.parallel import ParallelConfig
from trainer.config.resuming import flatten_settings, settings_as_dict
from trainer.config.run import Code, RunConfig, SlurmConfig
from trainer.reporting.code_revision import CODE_DIRECTORY, code_revision
from trainer.reporting.status import write_text_atomic

if TYPE_CHECKING:
    from launch.config.frozen import ComposedConfig

JOB_ID_REGEX = re.compile(r"\d+(;.*)?")
"""What `sbatch --parsable` prints of a job."""
UNREACHABLE_CONTROLLER_REGEX = re.compile(
    r"Unable to contact slurm controller|Could not establish a configuration source"
)
"""What sbatch says if SLURM's controller does not answer, or this host is not set up to use it."""


@dataclass(frozen=True, slots=True)
class Submission:
    """What SLURM took: a job, an array or a chain."""

    jobs: dict[str, str]
    """Job ids by part: train, and those of `launcher.pipeline`."""
    runs: list[str]
    """Run directories; those of an array in the order of its tasks."""
    scripts: dict[str, str]
    code: str | None
    """The copy of the code that the jobs run, or the clone; None where nothing was left to submit."""


def submit_runs(config: RunConfig, run_dirs: list[Path], *, print_only: bool) -> list[Submission]:
    """Submit runs of one configuration to SLURM, or with `print_only` print their job scripts and submit nothing.

    Several runs are one job array, or with `launcher.pipeline` a chain of jobs each. Writes the scripts into the run directories,
    and prints what to type next. Returns what was submitted. Raises ConfigError, also with the message of `sbatch`, and
    StorageError.
    """
    slurm = config.launcher
    if isinstance(slurm, SlurmConfig) and slurm.pipeline and len(run_dirs) > 1:
        submissions = []
        for run_dir in run_dirs:
            submissions += submit_runs(config, [run_dir], print_only=print_only)
        return submissions

    is_copied = isinstance(slurm, SlurmConfig) and slurm.code is Code.snapshot
    code_dir = CODE_DIRECTORY
    if is_copied and run_dirs:
        code_dir = snapshot.code_copy_dir(run_dirs[0], snapshot.code_digest(snapshot.read_code()))
    scripts = script_text_by_part(config, run_dirs, code_dir)
    assert isinstance(slurm, SlurmConfig)  # else no script was rendered
    if print_only:
        as_submitted = advice.settings_as_submitted(slurm)
        advice.refuse_lead_of_whole_time_limit(as_submitted)
        _print_scripts(as_submitted, scripts)
        return []

    # Everything that can refuse the job comes before the first file is written.
    if slurm.gpus_per_node_request is None:
        refuse_gpus_of_environment()
    notes = [*advice.job_notes_if_startable(config, run_dirs), *sbatch_variable_lines(scripts["train"])]
    _prepare_container(config)
    if is_copied:
        snapshot.copy_code(run_dirs[0])
    script_paths = _write_scripts(run_dirs, scripts)
    jobs = pipeline.submit_pipeline(script_paths, run_dirs[0], submit_script)
    job_by_part = {job.part: job.job_id for job in jobs}
    train_job = job_by_part["train"]
    with contextlib.suppress(StorageError):  # SLURM has the job, and the script in its directory names the run too
        write_submitted_job_ids(run_dirs, train_job)

    print(f"submitted job {train_job}: {script_paths['train']}")
    if len(jobs) > 1:
        print(pipeline.pipeline_table(jobs, config, run_dirs[0]))
    for line in [f"code    {code_description(code_dir, is_copied=is_copied)}", *notes]:
        print(f"  {line}")
    _print_next_steps(slurm, run_dirs, train_job)
    return [
        Submission(
            jobs=job_by_part,
            runs=[str(run_dir.absolute()) for run_dir in run_dirs],
            scripts={part: str(path) for part, path in script_paths.items()},
            code=str(code_dir),
        )
    ]


def refuse_unshared_model(config: RunConfig) -> None:
    """Raise ConfigError if ranks cannot share rows or experts of the run's models as `parallel` asks for it.

    Called before a job is submitted, which would otherwise wait in the queue for nothing. The models are the trained one, a
    teacher and reward models. If any of them is not on this host, nothing is checked here: the job itself finds out, before it
    prepares data.
    """
    if config.parallel == ParallelConfig():
        return
    from trainer.build.parallel import check_parallel
    from trainer.build.reward_models import reward_model_configs_by_setting
    from trainer.model.rules import read_config
    from trainer.objectives.frozen_model import teacher_model

    teacher = teacher_model(config.model, config.objective)
    models = [config.model] if teacher is None else [config.model, teacher]
    models += reward_model_configs_by_setting(config.objective).values()
    if all(read_config(model.path) is not None for model in models):
        check_parallel(config)


def _print_scripts(slurm: SlurmConfig, script_by_part: dict[str, str]) -> None:
    """Print the job scripts of a run instead of submitting them. `script_by_part`: {"train": "#!/bin/bash ..."} or more.

    `slurm`: the settings as sbatch would take them.
    Each script of a chain of jobs stands below the sbatch command that would submit it, with its dependency on the part before.
    Notes on ranks and time go to stderr, so that stdout is a script alone.
    """
    for note in [*advice.rank_layout_notes(slurm), *advice.time_limit_lines(slurm, [])]:
        print(f"# {note}", file=sys.stderr)
    print("# note    only `shardtune submit` without --print writes the files that the script reads", file=sys.stderr)
    previous_part: str | None = None
    for part, script in script_by_part.items():
        if len(script_by_part) > 1:
            dependency = ""
            if previous_part is not None:
                dependency = f" --dependency=afterok:<job of {previous_part}> --kill-on-invalid-dep=yes"
            print(f"# ---- {part}: sbatch{dependency} {part}.sbatch")
        print(script, end="")
        previous_part = part


def _prepare_container(config: RunConfig) -> None:
    """Refuse a container that cannot start before its job is submitted, and create the cache directory that is mounted into it.

    Does nothing for a run without a container. Raises ConfigError.
    """
    launcher = settings_as_dict(config)["launcher"]
    runtime = containers.container_runtime(launcher)
    if runtime is None:
        return
    if runtime == "pyxis":  # apptainer may be on the nodes alone; each of them is asked when the job starts
        containers.refuse_unavailable_container(launcher)
    Path(config.data.cache_dir).expanduser().mkdir(parents=True, exist_ok=True)


def _write_scripts(run_dirs: list[Path], script_by_part: dict[str, str]) -> dict[str, Path]:
    """Write all job scripts (text by part) into each run directory; returns the paths in the first one, which are submitted.

    Also creates the directories `logs`. Raises StorageError.
    """
    try:
        for run_dir in run_dirs:
            # Older SLURM fails a job without a message if the directory of its output is missing.
            (run_dir / "logs").mkdir(parents=True, exist_ok=True)
            for part, text in script_by_part.items():
                write_text_atomic(run_dir / f"{part}.sbatch", text)
    except OSError as error:
        raise StorageError(f"cannot write the job script: {error}; choose another run.dir") from error
    return {part: run_dirs[0].absolute() / f"{part}.sbatch" for part in script_by_part}


def script_text_by_part(config: RunConfig, run_dirs: list[Path], code_dir: Path) -> dict[str, str]:
    """The text of each job script that a run needs: {"train": "#!/bin/bash ..."}, or one for each part of `launcher.pipeline`.

    `code_dir`: the code that the jobs run.
    Raises ConfigError for settings that are not SLURM's or that a script cannot carry.
    """
    slurm = config.launcher
    if not isinstance(slurm, SlurmConfig) or not slurm.pipeline:
        return {"train": render_train_script(config, run_dirs, code_dir=code_dir)}
    run_dir = run_dirs[0]  # a pipeline has one run
    # With the user's options for that part (`launcher.part_options`).
    train_config = pipeline.train_job_config(config, run_dir)
    part_head_lines = functools.partial(script_head_lines, code_dir=code_dir)
    text_by_part = {}
    for part in slurm.pipeline:
        if part == "train":
            text_by_part[part] = render_train_script(train_config, run_dirs, code_dir=code_dir)
        else:
            text_by_part[part] = pipeline.part_script_text(config, part, run_dir, part_head_lines)
    return text_by_part


def _print_next_steps(slurm: SlurmConfig, run_dirs: list[Path], job: str) -> None:
    """Print the commands with which the user follows the submitted job, makes it save, and stops it. `job`: its id."""
    print(f"  queue   squeue --job {job}")
    if len(run_dirs) == 1:
        run = shlex.quote(str(run_dirs[0]))
        name = slurm.job_name or default_job_name([str(run_dirs[0].absolute())])
        log_of_first_node = run_dirs[0] / "logs" / f"{name}-{job}-0.log"
        print(f"  log     tail -F {shlex.quote(str(log_of_first_node))}")
    else:
        run = "<one of the runs>"
        print(f"  logs    below {', '.join(shlex.quote(str(run_dir / 'logs')) for run_dir in run_dirs)}")
    print(f"  save and requeue now: scancel --batch --signal=USR2 {job}")
    print(f"  save and end: shardtune stop {run}")


def sbatch_variable_lines(script: str) -> list[str]:
    """A line for people about each `SBATCH_*` variable: whether it reaches sbatch with this script. Within a job none does.

    `script`: the text of the job script.
    """
    return [] if "SLURM_JOB_ID" in os.environ else sort_sbatch_variables(script).lines()


def code_description(code_dir: Path, *, is_copied: bool) -> str:
    """Which code the job will run, for the output of `shardtune submit`: a copy, or the clone as it is when the job starts."""
    current = code_revision()
    revision_text = f" at {current}" if current else ""
    if is_copied:
        return f"{code_dir}: a copy of the code{revision_text}; later changes do not reach the job"
    return f"{code_dir}{revision_text}, as it is whenever the job starts (launcher.code=clone)"


def submit_script(script: Path, options: list[str]) -> str:
    """Submit a job script by sbatch; returns the job id.

    `options`: of sbatch, beside those in the script, such as a dependency.
    Raises ConfigError without the command sbatch, with sbatch's message if it refuses the script, or if it prints no job id.
    """
    env = sbatch_environment(script.read_text(encoding="utf-8"))
    command = ["sbatch", "--parsable", *options, str(script)]
    try:
        process = subprocess.run(command, env=env, capture_output=True, text=True, errors="replace")
    except FileNotFoundError:
        raise ConfigError(
            "launcher=slurm needs the command sbatch, which is not on PATH here: "
            f"submit {script} on a login node, or use launcher=local"
        ) from None
    if process.returncode:
        output = (process.stderr or process.stdout).strip()
        lines = [line.removeprefix("sbatch: error: ") for line in output.splitlines()]
        if UNREACHABLE_CONTROLLER_REGEX.search(output):
            raise ConfigError(
                f"sbatch cannot reach SLURM from this host: {'; '.join(lines)}; {script} is written: submit again where `sinfo` "
                "answers, such as a login node"
            )
        raise ConfigError(
            f"sbatch refused {script}: {'; '.join(lines)}; what it asks for is launcher.* (docs/slurm.md)"
        )
    return parse_job_id(process.stdout, script)


def parse_job_id(sbatch_output: str, script: Path) -> str:
    r"""Find the job id in the output of `sbatch --parsable`: "welcome\n1234;cluster\n" -> "1234".

    A cluster may print lines of its own before or after it. Raises ConfigError if no line, or several, could be the id. `script`:
    for the message.
    """
    lines = [line.strip() for line in sbatch_output.splitlines()]
    id_lines = [line for line in lines if JOB_ID_REGEX.fullmatch(line)]
    if len(id_lines) != 1:
        shown_output = " ".join(sbatch_output.split()) or "nothing"
        raise ConfigError(
            f"sbatch took {script}, but no job id is in what it printed: {shown_output}; the job may be in the queue: squeue --me"
        )
    job_id, _, _ = id_lines[0].partition(";")  # "id" or "id;cluster"
    return job_id


def submit_sweep(composed_runs: list[ComposedConfig], run_dirs: list[Path]) -> int:
    """Submit the runs of a sweep that are neither finished nor in the queue, those with the same request as one job array.

    `run_dirs`: the directory of each of `composed_runs`, into which its configuration is written.
    Returns 0, the exit code of the command. Raises ConfigError, before anything is written, if an array would be too large or
    ranks cannot share a run's model.
    """
    from launch.cluster.array_size import refuse_large_array
    from launch.config.frozen import is_finished
    from launch.runs.freeze import job_with_same_config, write_run_config

    runs = [_RunToSubmit(composed, run_dir) for composed, run_dir in zip(composed_runs, run_dirs, strict=True)]
    is_pipeline = bool(getattr(composed_runs[0].config.launcher, "pipeline", []))
    if not is_pipeline:  # a run with a pipeline is submitted as jobs of its own, and no array
        arrays = grouped_by_request(runs)
        refuse_large_array(max(len(array) for array in arrays))
    for composed in composed_runs:
        refuse_unshared_model(composed.config)
    # Write the configurations, and keep the runs that are to be submitted.
    remaining_runs: list[_RunToSubmit] = []
    for composed, run_dir in runs:
        job = job_with_same_config(composed, run_dir)
        if job is not None:
            print(f"{run_dir}: {job.description}; not submitted again")
            continue
        was_finished = is_finished(run_dir)  # asked before `write_run_config`, which writes a new configuration
        write_run_config(composed, run_dir)
        if was_finished:
            print(f"{run_dir}: already finished with this configuration; nothing to do")
        else:
            remaining_runs.append(_RunToSubmit(composed, run_dir))
    for array in grouped_by_request(remaining_runs):
        submit_runs(array[0].composed.config, [run.run_dir for run in array], print_only=False)
    return 0


class _RunToSubmit(NamedTuple):
    """A run of a sweep, with its directory."""

    composed: ComposedConfig
    run_dir: Path


def grouped_by_request(runs: list[_RunToSubmit]) -> list[list[_RunToSubmit]]:
    """Group the runs of a sweep that request the same of SLURM: each group can be one job array, whose tasks share all options.

    For three runs (a, b, c), of which b has another `launcher.time`: [[a, c], [b]].
    """
    runs_by_request: dict[str, list[_RunToSubmit]] = {}
    for run in runs:
        settings = flatten_settings(settings_as_dict(run.composed.config))
        launcher_settings = {key: value for key, value in settings.items() if key.startswith("launcher.")}
        # With the timeout, because the script's patience with slow ranks comes from it.
        request = json.dumps([launcher_settings, run.composed.config.run.timeout_s], sort_keys=True)
        runs_by_request.setdefault(request, []).append(run)
    return list(runs_by_request.values())

"""`shardtune train`, and `python -m launch.train` under torchrun and srun: starts a run, or is one rank of it.

The environment decides which. A launcher composes, freezes and starts. A rank loads the frozen configuration (or
composes the same arguments itself) and trains. How a run ended is read from its directory, where the first failing rank
left its error.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from launch.config import show_config
from launch.config.choices import choices_by_group
from launch.config.help_text import show_help
from launch.config.process_role import has_rank_variables, is_rank_process
from launch.config.verb_arguments import (
    VerbArguments,
    asks_for_help,
    flag,
    forwarded_settings,
    help_rows,
    option,
    read_arguments,
)
from launch.output import print_json, stdout_to_stderr
from strategies import exit_codes
from strategies.compat.python import end_process, run_exit_functions
from strategies.errors import ConfigError
from strategies.imports import importing_without_gc
from trainer.stopping.signals import block_signals, unblock_signals

if TYPE_CHECKING:
    from launch.config.frozen import ComposedConfig
    from trainer.config.run import RunConfig


@dataclass(kw_only=True)
class TrainArguments(VerbArguments):
    """What `shardtune train` takes beside settings."""

    settings: list[str] = forwarded_settings(forwards_unknown_flags=True)
    shown_config: str | None = option(
        "print the whole configuration (hydra: Hydra's own) and stop",
        key="--cfg",
        aliases=("-c",),
        example="[job|hydra|all]",
        choices=show_config.CFG_KINDS,
    )
    info: str | None = option(
        "print which files the configuration comes from and stop",
        key="--info",
        aliases=("-i",),
        example="[defaults|...]",
        choices=show_config.INFO_KINDS,
    )
    dry_run: bool = flag("print what the run would do and stop")
    as_json: bool = flag("at the end, print the result as JSON, for a script; messages go to stderr", key="--json")
    multirun: bool = flag(
        "train every combination, one run each: shardtune train -m strategy=ddp,fsdp2 optim.lr=1e-4,2e-4",
        key="-m",
        aliases=("--multirun",),
    )

    @property
    def only_shows(self) -> bool:
        """Whether the arguments ask to print something instead of training."""
        return self.shown_config is not None or self.info is not None or self.dry_run


DESCRIPTION_BY_COMMON_SETTING = {
    "model.path=<dir or hub id>": "the model to tune",
    "data.path=<file, dir, glob>": "the training data; data.eval_path or data.eval_share gives the evaluation data",
    "budget.steps|epochs|tokens=N": "how long to train; set exactly one of the three",
    "batch.global=64 batch.micro=4": (
        "documents in a step, and most documents in one forward pass (auto: what memory allows)"
    ),
    "optim.lr=2e-4": "peak learning rate; default: the usual one of the method, objective and optimizer (docs/peft.md)",
    "precision=bf16": "fp32, bf16, fp16 or auto",
    "launcher.processes=8": "ranks on this host; default: one per GPU",
    "run.dir=runs/first": "the run directory; the same command resumes the run",
    "run.resume=auto": "auto, never or a checkpoint directory",
    "logging.wandb=offline": "online, offline or disabled; docs/tracking.md",
}
"""The settings that people use most, as `--help` shows them."""


def main(argv: list[str]) -> int:
    """Run `shardtune train`: start the run that the arguments describe, take part in one as a rank, or print what it would be.

    Returns the exit code. The first of these that applies:

    - `--help` prints the usage;
    - arguments that cannot be used raise ConfigError;
    - `--info` prints how the configuration is composed;
    - a process that torchrun or srun has started trains as one rank;
    - otherwise this process launches the run or the sweep, or prints what it would be.
    """
    arguments, problems = read_arguments("train", TrainArguments, argv)
    needs_help = asks_for_help(argv)
    # Signals are blocked from the start of the process, so that a run can save. These commands have nothing to save (yet).
    if needs_help or problems or arguments.only_shows or arguments.as_json:
        unblock_signals()  # a signal ends the process at once; with --json, training blocks them again
    if needs_help:
        show_help(usage_text())
        return 0
    if arguments.as_json and (arguments.multirun or arguments.shown_config is not None):
        conflicting_flag = "-m" if arguments.shown_config is None else "--cfg"
        problems.append(
            f"--json: works for a single run; leave {conflicting_flag} out (runs by -m: shardtune compare "
            "<their directory> --json)"
        )
    if problems:
        raise ConfigError(problems)
    if arguments.info is not None:
        print("\n".join(show_config.composition_lines(arguments.settings)))
        return 0
    # Asked in every case: variables that are left over from a job are also refused with --cfg, --dry-run and -m.
    is_rank = is_rank_process(os.environ)
    only_trains = not (arguments.only_shows or arguments.as_json or arguments.multirun)
    if is_rank and only_trains:
        return train_as_rank(arguments.settings)
    return _train_or_show(arguments)


def _train_or_show(arguments: TrainArguments) -> int:
    """Train the run, search or sweep that the command line describes, or print what that would be; returns the exit code.

    - -m: a sweep or a search of several runs;
    - --cfg: the configuration is printed;
    - --dry-run: what the run would do is printed;
    - none of them: the run is trained; with --json, its result is printed.
    """
    # Without looking for garbage, which would take a fifth of the time to start.
    with importing_without_gc("torch"):
        from launch.config.compose import compose_config
        from launch.sweep.sweeper import is_search_requested

    settings = arguments.settings
    if arguments.multirun:
        return _run_or_show_points(arguments)
    if is_search_requested(settings):
        raise ConfigError("sweeper=: a search is of several runs; add -m, as in shardtune train -m sweeper=optuna ...")
    if arguments.shown_config is not None:
        # Unchecked: whoever looks for a mistake wants to see the configuration that has it.
        show_config.print_config(compose_config(settings, check=False), arguments.shown_config)
        return 0
    if arguments.dry_run:
        return _print_dry_run(settings, as_json=arguments.as_json)
    with stdout_to_stderr(arguments.as_json):
        with importing_without_gc("hydra"):
            composed = compose_config(settings)
        run_dir = run_dir_of_config(composed)
        code = launch_run(composed, run_dir)
    if arguments.as_json:
        print_json(run_result_json(run_dir, code))
    return code


def _run_or_show_points(arguments: TrainArguments) -> int:
    """Train the runs of a sweep or a search (-m), or with --cfg or --dry-run print them; returns the exit code.

    A point of a sweep is one run: a combination of the values that were given.
    """
    from launch.sweep.multirun import run_all_points
    from launch.sweep.sweeper import is_search_requested

    print_point = None
    if arguments.shown_config is not None or arguments.dry_run:
        print_point = partial(show_point, shown_config=arguments.shown_config)
    if is_search_requested(arguments.settings):
        return _run_or_show_search(arguments.settings, print_point)
    # Unchecked with --cfg, as for a single run: a configuration with a mistake can be looked at.
    return run_all_points(
        arguments.settings, run_point=launch_run, show_point=print_point, check=arguments.shown_config is None
    )


def _print_dry_run(overrides: list[str], *, as_json: bool) -> int:
    """Print what a run would do, for `--dry-run`; returns the exit code, 70 if a defect of ours prevents simulating its step.

    `as_json`: print the facts as one JSON object; messages meanwhile go to stderr.
    """
    with stdout_to_stderr(as_json):
        from launch.config.compose import compose_config
        from launch.plan.dry_run import describe_run

        description = describe_run(compose_config(overrides).config)
    if as_json:
        print_json({**description.facts, "exit_code": description.exit_code})
    else:
        print(description.text)
    return description.exit_code


def run_result_json(run_dir: Path, code: int) -> dict[str, Any]:
    """The answer of `train --json`: how a run ended, and where its record and export are; {"exit_code": 0, "record": ..., ...}.

    `code`: the exit code of the command.
    Metrics are in the run's files. A path that does not exist is None.
    """
    from launch.runs.stop_command import stopped_run_summary

    answer = {**stopped_run_summary(run_dir, shell_command=None), "exit_code": code}  # no command has stopped it
    # A run that failed, or that exports nothing, lacks these.
    for key, path in {"record": run_dir / "run.json", "export": run_dir / "export"}.items():
        answer[key] = str(path) if path.exists() else None
    return answer


def _run_or_show_search(arguments: list[str], print_point: Callable[[ComposedConfig], None] | None) -> int:
    """Search hyperparameters by Optuna, or write the file with which W&B's agents search; returns the exit code.

    `arguments`: as typed, with the ranges to search in. `print_point`: if it is not None, only the plan of the search is printed,
    and its first run by that function.
    """
    from launch.sweep.search import run_search, run_trial_to_end
    from launch.sweep.sweeper import plan_search, requested_sweeper_name, search_summary_text
    from launch.sweep.wandb_sweep_file import write_sweep_file

    if requested_sweeper_name(arguments) == "wandb":
        return write_sweep_file(arguments, print_only=print_point is not None)
    search = plan_search(arguments)
    if print_point is not None:
        summary = f"# {search_summary_text(search)}\n# the first one could be:"
        print(summary.replace("\n  ", "\n#   "))  # further lines of the summary become comments, too
        print_point(search.first_trial)
        return 0
    return run_search(search, search.directory, run_trial_to_end)


def show_point(composed: ComposedConfig, *, shown_config: str | None) -> None:
    """Print the run's whole configuration if `--cfg` asks for one (`shown_config`: job, hydra or all), else its dry run."""
    if shown_config:
        show_config.print_config(composed, shown_config)
        return
    from launch.plan.dry_run import describe_run

    print(describe_run(composed.config).text)


def run_dir_of_config(composed: ComposedConfig) -> Path:
    """The directory of a run: `run.dir`, or the default one below `runs/`."""
    from launch.config.compose import default_run_dir

    typed_directory = composed.config.run.dir
    return Path(typed_directory).expanduser() if typed_directory else default_run_dir(composed.sha256)


def launch_run(composed: ComposedConfig, run_dir: Path, *, isolate: bool = False) -> int:
    """Freeze a configuration into its run directory, and train it to the end or submit it to SLURM; returns the exit code.

    To freeze is to write it into `config.yaml`, by which ranks and later commands know the run. `isolate`: train in processes of
    its own, so that a failure leaves this one intact (for the runs of a sweep). Such a run keeps its strategy, which is what a
    sweep may compare; any other may go on under another one.
    """
    from launch.config.compose import is_finished
    from launch.runs.freeze import write_run_config
    from trainer.config.run import LauncherName

    config = composed.config
    # Looked up before `write_run_config`, which writes. Printed after it, once the directory is known to be this run's.
    was_finished = is_finished(run_dir)
    write_run_config(composed, run_dir, may_change_strategy=not isolate)
    if was_finished:
        print(f"{run_dir}: already finished with this configuration; nothing to do")
        return 0
    if config.launcher.name is LauncherName.slurm:
        from launch.cluster.submission import submit_runs

        unblock_signals()  # nothing is trained here that would have to be saved
        submit_runs(config, [run_dir], print_only=False)
        return 0
    # A run that is to be restarted needs a supervisor that outlives its ranks.
    restarts = any(config.launcher.retry.values())
    if config.launcher.in_place and not isolate and not restarts:
        return _train_in_this_process(config, run_dir, composed.sha256)
    from launch.cluster.supervisor import run_supervised
    from launch.compare import run_report

    code = run_supervised(config, run_dir, composed.sha256)
    if code != exit_codes.INTERRUPTED:  # who pressed Ctrl-C waits for nothing more
        run_report.write_report_at_end(config, run_dir)
    return code


def train_as_rank(arguments: list[str]) -> int:
    """Train as one rank of a run, in a process that our launcher, torchrun or srun has started; returns the exit code.

    `arguments`: the settings on the command line, for a rank without our launcher.
    Returns 0 also if preempted: another code would make torchrun or srun end the other ranks. Returns 70 after an error that our
    launcher shows.
    """
    block_signals()
    from launch.config.process_role import export_torchrun_variables
    from strategies.parent_death import die_with_parent

    export_torchrun_variables()
    rank = int(os.environ["RANK"])
    _refuse_restarts(os.environ)
    if "TORCHELASTIC_RUN_ID" in os.environ:  # under torchrun; if that is killed, nobody else would end this rank
        die_with_parent()
    run = _read_run_of_rank(arguments, rank)
    if run.is_finished:
        print(f"{run.directory}: already finished with this configuration; nothing to do")
        return 0
    has_launcher = "SHARDTUNE_LAUNCHER" in os.environ
    try:
        _train_recording_failure(run.config, run.directory, run.sha256, rank)
    except Exception:
        is_recorded = run.directory is not None and (run.directory / "failure.json").exists()
        if has_launcher and is_recorded:
            return exit_codes.FAILED  # the launcher shows the first failure, last; the other ranks only lost their peer
        raise
    if rank == 0 and not has_launcher:
        from launch.compare import run_report

        run_report.write_report_at_end(run.config, run.directory)
    return 0


@dataclass(frozen=True, slots=True)
class RankRun:
    """The run that a rank trains."""

    config: RunConfig
    directory: Path | None
    """None for a rank that learns the directory from rank 0 when they meet."""
    sha256: str
    is_finished: bool


def _read_run_of_rank(arguments: list[str], rank: int) -> RankRun:
    """Find out which run this rank trains, and read its configuration.

    Our launcher has frozen it (`SHARDTUNE_CONFIG` names the `config.yaml`). Otherwise, as under torchrun, it is composed from the
    settings on the command line (`arguments`), and rank 0 freezes it into its directory. Raises ConfigError, StorageError.
    """
    with importing_without_gc("torch"):
        from launch.config.compose import compose_config, is_finished, load_frozen_config
        from launch.config.frozen import config_sha256
        from launch.config.resume import keep_earlier_defaults
        from launch.runs.freeze import write_run_config

    frozen_config = os.environ.get("SHARDTUNE_CONFIG")
    if frozen_config:
        config = load_frozen_config(frozen_config)
        run_dir = Path(frozen_config).parent
        return RankRun(config, run_dir, config_sha256(config), is_finished=is_finished(run_dir))
    composed = compose_config(arguments)
    config = composed.config
    named_dir = Path(config.run.dir).expanduser() if config.run.dir else None
    was_finished = named_dir is not None and is_finished(named_dir)  # before freezing, which writes a new configuration
    if rank == 0:
        run_dir = write_run_config(composed, named_dir or run_dir_of_config(composed), may_change_strategy=True)
        return RankRun(config, run_dir, composed.sha256, was_finished)
    if named_dir is not None:
        # A resumed run keeps defaults that have changed since. Rank 0 sees to that when it freezes the configuration.
        keep_earlier_defaults(composed, named_dir)
    return RankRun(config, named_dir, composed.sha256, was_finished)


def _refuse_restarts(env: Mapping[str, str]) -> None:
    """Raise ConfigError for `torchrun --max-restarts`: ranks that it starts again may wait for each other for ever."""
    if int(env.get("TORCHELASTIC_MAX_RESTARTS") or 0):
        raise ConfigError(
            f"torchrun --max-restarts={env['TORCHELASTIC_MAX_RESTARTS']}: ranks that torchrun starts again may wait for each "
            "other for ever (torch 2.13 with gloo); leave it out: the same command continues a run from its last checkpoint"
        )


def _train_in_this_process(config: RunConfig, run_dir: Path, sha256: str) -> int:
    """Train in the process of the command, which is the run's only rank; returns the exit code. Raises the errors of training.

    Afterwards writes the report of the run, unless it was interrupted, or another attempt has taken its directory over. `sha256`:
    the identity of the run.
    """
    from launch.cluster.supervisor import find_run_directory, record_run_outcome, state_before_start
    from launch.compare import run_report
    from strategies.errors import NotRunOwner, Preempted

    earlier_state = state_before_start(run_dir)
    code = 0
    print("starting 1 process", file=sys.stderr, flush=True)  # before the libraries are loaded, which takes seconds
    try:
        _train_recording_failure(config, run_dir, sha256, rank=0)
    except Preempted as stop:
        # 0 for a preemption, so that the scheduler counts it as a normal end; 130 is the shell's code for Ctrl-C.
        code = exit_codes.INTERRUPTED if stop.signal_name == "SIGINT" else 0
    except NotRunOwner:  # without a report, because the directory belongs to another attempt
        raise
    except Exception:  # the command line says what it is
        run_report.write_report_at_end(config, find_run_directory(run_dir, earlier_state))
        raise
    code = record_run_outcome(run_dir, code, earlier_state)
    if code != exit_codes.INTERRUPTED:  # who pressed Ctrl-C waits for nothing more
        run_report.write_report_at_end(config, find_run_directory(run_dir, earlier_state))
    return code


def _train_recording_failure(config: RunConfig, run_dir: Path | None, sha256: str, rank: int) -> None:
    """Train as rank `rank`, and record an error in the run directory before it is raised again.

    Only the first failing rank is recorded. `run_dir`: None for a rank that learns it from rank 0. `sha256`: the identity of the
    run. Preempted (saved after a signal) is only raised if this is the only rank, whose command then ends with a code of its own.
    """
    from launch.config.frozen import rewrite_config_with_own_choices
    from launch.config.trusted_values import remember_config
    from strategies.errors import NotRunOwner, Preempted
    from trainer.reporting.status import record_failure

    with importing_without_gc("trainer.run"):
        from trainer.run import train_as_rank

    try:
        train_as_rank(config, run_dir, sha256, rewrite_config_with_own_choices)
    except Preempted:
        # With several ranks, torchrun or srun would end the others if one ended with an error.
        if int(os.environ.get("WORLD_SIZE", 1)) == 1:
            raise
    except NotRunOwner:  # the directory belongs to another attempt, in which nothing may be recorded
        raise
    except Exception as error:
        if run_dir is not None:
            record_failure(run_dir, rank, error, "worker")  # no-op where the trainer has recorded it with its step
        raise
    finally:
        if rank == 0 and config.model.trust_remote_code and config.model.download:
            remember_config(config)  # once more: code that the run has downloaded was not there when it was frozen


def usage_text() -> str:
    """The text of `shardtune train --help`."""
    more_flags = {
        "--config-dir <dir>": "a directory laid out like conf/, whose files become choices",
        "-m sweeper=optuna": (
            "search with Optuna: optim.lr='tag(log,interval(1e-5,1e-3))'; sweeper=wandb searches with W&B's agent"
        ),
    }
    settings = "\n".join(f"  {arguments:<32}{text}" for arguments, text in DESCRIPTION_BY_COMMON_SETTING.items())
    choices = "\n".join(f"  {group + '=':<12}{' '.join(names)}" for group, names in choices_by_group().items() if names)
    return f"""usage: shardtune train [flags] [key=value ...]

  shardtune train model.path=models/smollm2 data.path=train.jsonl tuning=lora budget.epochs=3
  shardtune train my.yaml optim.lr=1e-4 run.dir=runs/first

settings:
{settings}

groups:
{choices}

flags:
{help_rows(TrainArguments, more_flags)}

An argument such as my.yaml is a settings file. Settings on the command line override it. ~key sets a setting back to its default.
conf/ and docs/config.md list every setting with its meaning.

The same settings work with torchrun and sbatch:
  torchrun --nproc-per-node=8 -m launch.train <settings>
  sbatch slurm/train.sbatch <settings>"""


def exit_process(code: int) -> NoReturn:
    """End this process with an exit code; one of several ranks, and a rank that failed, skips the interpreter's shutdown.

    The threads of process groups, destroyed or broken, can abort an interpreter that shuts down in order. After a success, the
    registered exit functions run before.
    """
    is_one_of_several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    succeeded_as_rank = code == 0 and is_one_of_several
    # The only rank of a job, too: its process group may be broken. It has the variables of a rank, and a WORLD_SIZE of 1.
    failed_as_rank = code != 0 and has_rank_variables(os.environ)
    if succeeded_as_rank or failed_as_rank:
        if code == 0:
            run_exit_functions()
        sys.stdout.flush()
        sys.stderr.flush()
        end_process(code)
    sys.exit(code)


if __name__ == "__main__":
    block_signals()
    from launch.main import run_guarded
    from launch.streams import restart_in_utf8

    restart_in_utf8()

    exit_process(run_guarded("train", sys.argv[1:]))

"""`shardtune submit`: composes and freezes a run and hands it to SLURM. `--print` or `--dry-run` only show the scripts.

Refuses any launcher but SLURM's; without a choice on the command line it takes `launcher=slurm`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from launch.config.help_text import show_help
from launch.config.show_config import CFG_KINDS, print_config
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
from strategies.errors import ConfigError


@dataclass(kw_only=True)
class SubmitArguments(VerbArguments):
    """What `shardtune submit` takes."""

    settings: list[str] = forwarded_settings(forwards_unknown_flags=True)
    print_only: bool = flag("print the script of each job and stop", key="--print", aliases=("--dry-run",))
    as_json: bool = flag("print job ids, run directories and scripts as JSON", key="--json")
    shown_config: str | None = option(
        "print the whole configuration and stop",
        key="--cfg",
        aliases=("-c",),
        example="[job|hydra|all]",
        choices=CFG_KINDS,
    )
    multirun: bool = flag(
        "submit every combination as one job array: shardtune submit -m strategy=fsdp2,zero3 ...",
        key="-m",
        aliases=("--multirun",),
    )


USAGE = f"""usage: shardtune submit [--print] [--json] [-m] [--cfg] [key=value ...]

  shardtune submit model.path=... data.path=... strategy=fsdp2 launcher.nodes=2 launcher.gpus_per_node=8 run.dir=runs/first
  shardtune submit <settings> data.eval_share=0.05 launcher.pipeline=[prepare,train,evaluate,export] launcher.cpu_partition=cpu
  shardtune submit <settings> launcher.after=17

submit hands a run to SLURM. It takes the settings of `train`. If a run has not finished, the same command requeues it. The
settings launcher.* say what the job asks SLURM for; conf/launcher/slurm.yaml lists them.

{help_rows(SubmitArguments)}

docs/slurm.md leads you from login to a requeued run on two nodes."""


def main(argv: list[str]) -> int:
    """Run `shardtune submit`: hand a run or a sweep to SLURM, or print what would be handed over; returns the exit code, 0.

    `launcher=slurm` is added if no launcher is given. Raises ConfigError, also for what SLURM refuses, and StorageError.
    """
    if asks_for_help(argv):
        show_help(USAGE)
        return 0
    arguments, problems = read_arguments("submit", SubmitArguments, argv)
    if arguments.as_json and (arguments.print_only or arguments.multirun or arguments.shown_config is not None):
        problems.append(
            "--json: tells what was submitted of one run; leave --print, --dry-run, --cfg and -m out, or it"
        )
    if problems:
        raise ConfigError(problems)
    if not any(setting.startswith("launcher=") for setting in arguments.settings):
        arguments.settings.insert(0, "launcher=slurm")
    if arguments.multirun:
        from launch import train

        show_only = ["--dry-run"] if arguments.print_only else []
        cfg_arguments = [] if arguments.shown_config is None else ["--cfg", arguments.shown_config]
        return train.main(["-m", *arguments.settings, *show_only, *cfg_arguments])
    return _submit_one(arguments)


def _submit_one(arguments: SubmitArguments) -> int:
    """Freeze and submit the run that the command line describes, or print its configuration or job script; returns 0.

    To freeze is to write the run's settings into the `config.yaml` of its directory. A run that is finished is not submitted
    again, unless it has a pipeline (a chain of jobs), whose later jobs may be missing.
    """
    from launch.cluster.submission import Submission, refuse_unshared_model, submit_runs
    from launch.config.compose import compose_config, default_run_dir, is_finished
    from launch.runs.freeze import write_run_config

    submitted: list[Submission] = []
    with stdout_to_stderr(arguments.as_json):
        composed = compose_config(arguments.settings, check=arguments.shown_config is None)
        if arguments.shown_config is not None:
            print_config(composed, arguments.shown_config)
            return 0
        refuse_unshared_model(composed.config)
        typed_directory = composed.config.run.dir
        run_dir = Path(typed_directory).expanduser() if typed_directory else default_run_dir(composed.sha256)
        was_finished = not arguments.print_only and is_finished(run_dir)
        if not arguments.print_only:
            run_dir = write_run_config(composed, run_dir, may_change_strategy=True)
        # The later parts of a pipeline may be open although the training is done.
        if was_finished and not getattr(composed.config.launcher, "pipeline", []):
            print(f"{run_dir}: already finished with this configuration; nothing to do")
        else:
            submitted = submit_runs(composed.config, [run_dir], print_only=arguments.print_only)
    # With --json, the answer of a run that was not submitted names no job.
    if arguments.as_json:
        nothing = Submission(jobs={}, runs=[str(run_dir.absolute())], scripts={}, code=None)
        [answer] = submitted or [nothing]
        print_json(asdict(answer))
    return 0

"""`shardtune train`, and `python -m launch.train` under torchrun and srun: starts a run, or is one rank of it.

The environment decides which. A launcher composes, freezes and starts. A rank loads the frozen configuration (or
composes the same words itself) and trains. How a run ended is read from its directory, where the first failing rank
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
from launch.config.choices import groups
from launch.config.help_text import show_help
from launch.config.process_role import is_worker, seems_a_worker
from launch.config.verb_words import VerbWords, asks_for_help, flag, help_rows, read_words, setting_words, word
from launch.output import give, said_to_stderr
from strategies.compat.python import end_process, run_exit_functions
from strategies.errors import ConfigError
from trainer.stopping.signals import hold, release

if TYPE_CHECKING:
    from launch.config.frozen import Composed
    from trainer.config.run import RunConfig


@dataclass(kw_only=True)
class TrainWords(VerbWords):
    """What `shardtune train` takes beside settings."""

    settings: list[str] = setting_words(and_flags=True)
    cfg: str | None = word(
        "print the whole configuration (hydra: Hydra's own) and stop",
        key="--cfg",
        also=("-c",),
        like="[job|hydra|all]",
        choices=show_config.CFG_KINDS,
    )
    info: str | None = word(
        "print where the configuration comes from and stop",
        key="--info",
        also=("-i",),
        like="[defaults|...]",
        choices=show_config.INFO_KINDS,
    )
    dry_run: bool = flag("print what the run would do and stop")
    as_json: bool = flag("at the end print how it ended, for a script; what is said goes to stderr", key="--json")
    multirun: bool = flag(
        "one run a point: shardtune train -m strategy=ddp,fsdp2 optim.lr=1e-4,2e-4", key="-m", also=("--multirun",)
    )


def main(argv: list[str]) -> int:
    """Run the verb; returns the exit code. Errors: ConfigError and whatever the run itself raises."""
    words, problems = read_words("train", TrainWords, argv)
    shows = words.cfg is not None or words.info is not None or words.dry_run or words.as_json or asks_for_help(argv)
    if shows or problems:
        release()
    if asks_for_help(argv):
        show_help(usage())
        return 0
    if words.as_json and (words.multirun or words.cfg is not None):
        other = "-m" if words.cfg is None else "--cfg"
        problems.append(
            f"--json: works for a single run; leave {other} out (runs by -m: shardtune compare <their directory> --json)"
        )
    if problems:
        raise ConfigError(problems)
    settings = words.settings
    if words.info is not None:
        print("\n".join(show_config.composition_lines(settings)))
        return 0
    if is_worker(os.environ) and not shows and not words.multirun:
        return worker(settings)
    from launch.config.compose import compose
    from launch.sweep.sweeper import is_search

    if words.multirun:
        from launch.sweep.multirun import multirun

        look = partial(show, cfg=words.cfg) if words.cfg is not None or words.dry_run else None
        if is_search(settings):
            return _search(settings, look)
        return multirun(settings, launch=launch, show=look, check=words.cfg is None)
    if is_search(settings):
        raise ConfigError("sweeper=: a search is of several runs; add -m, as in shardtune train -m sweeper=optuna ...")
    if words.cfg is not None:
        show_config.show(compose(settings, check=False), words.cfg)
        return 0
    if words.dry_run:
        return _dry_run(settings, as_json=words.as_json)
    with said_to_stderr(words.as_json):
        composed = compose(settings)
        run_dir = run_dir_of(composed)
        code = launch(composed, run_dir)
    if words.as_json:
        give(ended(run_dir, code))
    return code


def _dry_run(words: list[str], *, as_json: bool) -> int:
    """Print what a run would do; returns the exit code: 70 if a defect keeps its step from being simulated."""
    with said_to_stderr(as_json):
        from launch.config.compose import compose
        from launch.plan.dry_run import describe

        would = describe(compose(words).config)
    if as_json:
        give({**would.facts, "exit_code": would.exit_code})
    else:
        print(would.text)
    return would.exit_code


def ended(run_dir: Path, code: int) -> dict[str, Any]:
    """How a run ended, for a script; what it measured stands in its files."""
    from launch.runs.stop_command import stands

    there = {name: run_dir / place for name, place in (("record", "run.json"), ("export", "export"))}
    files = {name: str(path) if path.exists() else None for name, path in there.items()}
    return {**stands(run_dir, None), "exit_code": code, **files}


def _search(words: list[str], look: Callable[[Composed], None] | None) -> int:
    from launch.sweep.search import run_search, start
    from launch.sweep.sweeper import listing, plan_search, sweeper_of
    from launch.sweep.wandb_sweep_file import write_sweep

    if sweeper_of(words) == "wandb":
        return write_sweep(words, print_only=look is not None)
    search = plan_search(words)
    if look is not None:
        print(f"# {listing(search)}\n# the first one could be:".replace("\n  ", "\n#   "))
        look(search.first)
        return 0
    return run_search(search, search.directory, start)


def show(composed: Composed, *, cfg: str | None) -> None:
    """Print the configuration (`cfg`: which), or what the run would do."""
    if cfg:
        show_config.show(composed, cfg)
        return
    from launch.plan.dry_run import describe

    print(describe(composed.config).text)


def run_dir_of(composed: Composed) -> Path:
    """The directory asked for, or the default one."""
    from launch.config.compose import default_run_dir

    asked = composed.config.run.dir
    return Path(asked).expanduser() if asked else default_run_dir(composed.sha256)


def launch(composed: Composed, run_dir: Path, *, isolate: bool = False) -> int:
    """Freeze and run (or submit) to the end; returns the exit code. `isolate` never trains in this process."""
    from launch.config.compose import is_finished
    from launch.runs.freeze import freeze
    from trainer.config.run import LauncherName

    finished = is_finished(run_dir)  # asked first, but told only once the directory is known to be this run's
    config = composed.config
    freeze(composed, run_dir, another_way=not isolate)
    if finished:
        print(f"{run_dir}: already finished with this configuration; nothing to do")
        return 0
    if config.launcher.name is LauncherName.slurm:
        from launch.cluster.submission import submit

        release()
        submit(config, [run_dir], print_only=False)
        return 0
    launcher = config.launcher
    # What is started again by itself outlives its ranks.
    if launcher.in_place and not isolate and not any(launcher.retry.values()):
        return _run_here(config, run_dir, composed.sha256)
    from launch.cluster.supervisor import supervised
    from launch.compare import run_report

    code = supervised(config, run_dir, composed.sha256)
    if code != 130:  # who pressed Ctrl-C waits for nothing more
        run_report.at_end(config, run_dir)
    return code


def worker(words: list[str]) -> int:
    """Be one rank. Returns 0 also when preempted: another code would make torchrun or srun end the other ranks."""
    hold()
    from launch.config.compose import compose, is_finished, load_frozen
    from launch.config.frozen import identity, keep_earlier_defaults
    from launch.config.process_role import export
    from launch.runs.freeze import freeze
    from strategies.parent_death import die_with_parent

    export()
    rank = int(os.environ["RANK"])
    _refuse_restarts(os.environ)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent()
    frozen = os.environ.get("SHARDTUNE_CONFIG")
    run_dir: Path | None
    if frozen:
        config, run_dir = load_frozen(frozen), Path(frozen).parent
        sha256 = identity(config)
        finished = is_finished(run_dir)
    else:
        composed = compose(words)
        config = composed.config
        run_dir = Path(config.run.dir).expanduser() if config.run.dir else None
        finished = run_dir is not None and is_finished(run_dir)
        if rank == 0:  # the others learn the directory from rank 0 when they meet
            run_dir = freeze(composed, run_dir or run_dir_of(composed), another_way=True)
        elif run_dir is not None:
            keep_earlier_defaults(composed, run_dir)
        sha256 = composed.sha256
    if finished:
        print(f"{run_dir}: already finished with this configuration; nothing to do")
        return 0
    try:
        _train(config, run_dir, sha256, rank)
    except Exception:
        if "SHARDTUNE_LAUNCHER" in os.environ and run_dir is not None and (run_dir / "failure.json").exists():
            return 70  # the launcher shows the first failure, last; the other ranks only lost their peer
        raise
    if rank == 0 and "SHARDTUNE_LAUNCHER" not in os.environ:
        from launch.compare import run_report

        run_report.at_end(config, run_dir)
    return 0


def _refuse_restarts(env: Mapping[str, str]) -> None:
    if int(env.get("TORCHELASTIC_MAX_RESTARTS") or 0):
        raise ConfigError(
            f"torchrun --max-restarts={env['TORCHELASTIC_MAX_RESTARTS']}: ranks that torchrun starts again may wait for each "
            "other for ever (torch 2.13 with gloo); leave it out: the same command continues a run from its last checkpoint"
        )


def _run_here(config: RunConfig, run_dir: Path, sha256: str) -> int:
    from launch.cluster.supervisor import begin, found, outcome
    from launch.compare import run_report
    from strategies.errors import NotOurs, Preempted

    code, before = 0, begin(run_dir)
    print("starting 1 process", file=sys.stderr, flush=True)  # before the libraries are loaded, which takes seconds
    try:
        _train(config, run_dir, sha256, 0)
    except Preempted as stop:
        code = 130 if stop.signal_name == "SIGINT" else 0
    except NotOurs:
        raise
    except Exception:  # of which the command line says what it is
        run_report.at_end(config, found(run_dir, before))
        raise
    code = outcome(run_dir, code, before)
    if code != 130:  # who pressed Ctrl-C waits for nothing more
        run_report.at_end(config, found(run_dir, before))
    return code


def _train(config: RunConfig, run_dir: Path | None, sha256: str, rank: int) -> None:
    """Train, and leave the error of the first failing rank in the run directory."""
    from launch.config.frozen import freeze_choices
    from launch.config.trusted_values import remember_config
    from strategies.errors import NotOurs, Preempted
    from trainer.reporting.status import record_failure
    from trainer.run import run_worker

    try:
        run_worker(config, run_dir, sha256, freeze_choices)
    except Preempted:
        if int(os.environ.get("WORLD_SIZE", 1)) == 1:
            raise
    except NotOurs:
        raise
    except Exception as error:
        if run_dir is not None:
            record_failure(run_dir, rank, error, "worker")  # no-op where the trainer has recorded it with its step
        raise
    finally:
        if rank == 0 and config.model.trust_remote_code and config.model.download:
            remember_config(config)  # once more: code that the run has downloaded was not there when it was frozen


def usage() -> str:
    """The text of `shardtune train --help`."""
    common = [
        ("model.path=<dir or hub id>", "the model to tune"),
        ("data.path=<file, dir, glob>", "training data; data.eval_path or data.eval_share for evaluation"),
        ("budget.steps|epochs|tokens=N", "how long to train; exactly one"),
        ("batch.global=64 batch.micro=4", "documents a step, and at most in one forward pass (auto: as memory allows)"),
        ("optim.lr=2e-4", "peak learning rate"),
        ("precision=bf16", "fp32, bf16, fp16 or auto"),
        ("launcher.processes=8", "ranks on this host; default: one a GPU"),
        ("run.dir=runs/first", "directory of the run; the same command continues it"),
        ("run.resume=auto", "auto, never or a checkpoint directory"),
        ("logging.wandb=offline", "online, offline or disabled; docs/tracking.md"),
    ]
    more = {
        "--config-dir <dir>": "a directory laid out as conf/ whose files are choices too",
        "-m sweeper=optuna": "a search: optim.lr='tag(log,interval(1e-5,1e-3))'; sweeper=wandb: for W&B's agent",
    }
    rows = "\n".join(f"  {key:<32}{what}" for key, what in common)
    choices = "\n".join(f"  {group + '=':<12}{' '.join(names)}" for group, names in groups().items() if names)
    return (
        f"usage: shardtune train [flags] [key=value ...]\n\nsettings:\n{rows}\n\n"
        f"groups:\n{choices}\n\nflags:\n{help_rows(TrainWords, more)}\n\n"
        "A bare my.yaml is a file of settings; what is typed goes before it. ~key takes a setting back to its default.\n"
        "Every setting is listed with its meaning in conf/. The same words work as\n"
        "  torchrun --nproc-per-node=8 -m launch.train <words>\n  sbatch slurm/train.sbatch <words>"
    )


def end(code: int) -> NoReturn:
    """Leave the process; a rank of several, and any that failed, at once.

    The threads of process groups, destroyed or broken, can abort an interpreter that takes itself apart. What was registered
    to be done at its end is done before, after a success.
    """
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if (not code and several) or (code and seems_a_worker(os.environ)):
        if not code:
            run_exit_functions()
        sys.stdout.flush()
        sys.stderr.flush()
        end_process(code)
    sys.exit(code)


if __name__ == "__main__":
    hold()
    from launch.main import guarded
    from launch.streams import restart_in_utf8

    restart_in_utf8()

    end(guarded("train", sys.argv[1:]))

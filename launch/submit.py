"""`shardtune submit`: compose and freeze a run, then hand it to SLURM. With `--print` (or `--dry-run`) show its scripts and stop.

Refuses any launcher but SLURM's; without a choice on the command line it takes `launcher=slurm`.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from launch.config.help_text import show_help
from launch.output import FLAG, give, said_to_stderr

USAGE = """usage: shardtune submit [--print] [--json] [-m] [--cfg] [key=value ...]

  shardtune submit model.path=... data.path=... strategy=fsdp2 launcher.nodes=2 launcher.gpus_per_node=8 run.dir=runs/first
  shardtune submit <the words> data.eval_share=0.05 launcher.pipeline=[prepare,train,evaluate,export] launcher.cpu_partition=cpu
  shardtune submit <the words> launcher.after=17

Takes the words of train; the same words requeue a run that is not finished. What is asked of SLURM is launcher.*, listed in
conf/launcher/slurm.yaml.

  --print, --dry-run   print the script of each job and stop
  --json               print the job ids, run directories and scripts in place of what a person needs to know
  --cfg                print the whole configuration and stop
  -m                   one run a point, as a job array: shardtune submit -m strategy=fsdp2,zero3 ...

docs/slurm.md goes from login to a requeued run of two nodes."""


def main(argv: list[str]) -> int:
    """Submit the run that the overrides in `argv` describe; returns 0. Errors: those of composing and of `submit`."""
    if {"-h", "--help"} & set(argv):
        show_help(USAGE)
        return 0
    from launch.cluster.submission import Submitted, submit
    from launch.config import show_config
    from launch.config.compose import compose, default_run_dir, is_finished
    from launch.runs.freeze import freeze
    from strategies.errors import ConfigError

    flags, as_json = {"--print", "--dry-run"} & set(argv), FLAG in argv
    words = [word for word in argv if word not in flags and word != FLAG]
    if as_json and (flags or {"-m", "--multirun", "--cfg"} & set(words)):
        raise ConfigError(
            "--json: tells what was submitted of one run; leave --print, --dry-run, --cfg and -m out, or it"
        )
    if not any(word.startswith("launcher=") for word in words):
        words.insert(0, "launcher=slurm")
    if {"-m", "--multirun"} & set(words):
        from launch import train

        return train.main([*words, *(["--dry-run"] if flags else [])])
    words, cfg, _ = show_config.take(words)
    with said_to_stderr(as_json):
        composed = compose(words, check=not cfg)
        if cfg:
            show_config.show(composed, cfg)
            return 0
        asked, submitted = composed.config.run.dir, []
        run_dir = Path(asked).expanduser() if asked else default_run_dir(composed.sha256)
        finished = not flags and is_finished(run_dir)
        if not flags:
            run_dir = freeze(composed, run_dir, another_way=True)
        if finished and not getattr(composed.config.launcher, "pipeline", []):
            print(f"{run_dir}: already finished with this configuration; nothing to do")
        else:
            submitted = submit(composed.config, [run_dir], print_only=bool(flags))
    if as_json:
        [told] = submitted or [Submitted({}, [str(run_dir.absolute())], {}, None)]
        give(asdict(told))
    return 0

"""`shardtune evaluate <arguments of a run with objective=grpo>`: tries the rewards on answers of the model before a run."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.config.output_directory import require_output_directory
from launch.evaluate.job_files import CONFIG_FILE, JOB_FILE, write_job_files
from launch.output import TableColumn, TableRow, format_table, print_json, stdout_to_stderr, wrap_text
from strategies import exit_codes
from trainer.pages.numbers import format_percent
from trainer.stopping.signals import block_signals

if TYPE_CHECKING:
    from launch.evaluate.arguments import EvaluateArguments
    from trainer.config.run import RunConfig
    from trainer.reward_trial import RewardTrialJob

REWARD_COLUMNS = (
    TableColumn("reward"),
    TableColumn("mean", is_number=True),
    TableColumn("least", is_number=True),
    TableColumn("most", is_number=True),
    TableColumn("spread in a group", is_number=True),
    TableColumn("idle groups", is_number=True),
    TableColumn("unscored", is_number=True),
)
NUM_SHOWN_GROUPS = 3
"""Groups of answers (to one prompt each) that are printed."""


def should_try_rewards(arguments: EvaluateArguments) -> bool:
    """Whether `shardtune evaluate` tries the rewards of a run, which score its answers, instead of running tasks.

    True if its arguments name a run that learns from rewards and has no tasks, or describe such a run (objective=grpo). False
    if they name something else to evaluate: tasks, a server, against= or split=test.
    """
    from launch.config.compose import compose_config
    from trainer.objectives.registry import FAMILIES, objective_family

    names_tasks = any(setting.startswith(("evaluation.tasks", "evaluation.server")) for setting in arguments.settings)
    if arguments.against is not None or names_tasks or arguments.split == "test":
        return False
    if arguments.run is not None:
        objective = _objective_of_run_without_tasks(arguments.run)
        # Only objectives that learn from rewards let the model write answers (`rollout`).
        return objective in FAMILIES and FAMILIES[objective].rollout is not None
    if not any(setting.startswith("objective=") for setting in arguments.settings):
        return False
    return objective_family(compose_config(arguments.settings, check=False).config.objective).rollout is not None


def _objective_of_run_without_tasks(run: Path) -> str | None:
    """The objective of a run, such as "grpo"; None if the run has evaluation tasks, or its config.yaml cannot be read."""
    import yaml

    try:
        tree = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
        has_tasks = bool(tree["evaluation"].get("tasks"))
        name = str(tree["objective"]["name"])
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError, AttributeError):
        return None
    return None if has_tasks else name


def try_rewards(arguments: EvaluateArguments) -> int:
    """Try the rewards of a run: the model answers prompts of its first round, and the answers are scored.

    The run has not started yet, or one of its checkpoints answers (`arguments.run`). Prints a report. The ranks write it and
    their records into the output directory: `to=`, or the run's directory, or one below runs/ for a run that may be somebody
    else's. Returns the exit code. Raises ConfigError for settings that could not start the run.
    """
    from launch.cluster.supervisor import record_run_outcome, run_supervised, state_before_start
    from launch.cluster.torchrun import RankProgram
    from launch.config.read_run import may_write_results
    from strategies.errors import Preempted
    from trainer.reward_trial import REPORT, RewardTrialJob, trial_worker
    from trainer.rollout.rewards.copies import copy_rewards

    job = RewardTrialJob()
    if arguments.run is None:
        config = _config_of_new_run(arguments)
        default_output_dir = Path("runs") / f"evaluate-{Path(str(config.model.path)).name}"
    else:
        config, job = _trial_of_run(arguments.run, arguments)
        default_output_dir = arguments.run
        if not may_write_results(arguments.run):
            default_output_dir = Path("runs") / f"evaluate-{arguments.run.resolve().name}"
    output_dir = Path(arguments.to or default_output_dir)
    require_output_directory(output_dir)
    job_dir = output_dir / "evaluation"
    # Copied anew, so that the ranks run no reward file that lay in the directory before.
    copy_rewards(getattr(config.objective, "rewards", {}), job_dir)
    config.run.dir = str(job_dir)
    config_sha256 = write_job_files(job_dir, config, asdict(job))
    with stdout_to_stderr(arguments.as_json):
        if config.launcher.in_place:
            block_signals()
            earlier_state = state_before_start(job_dir)
            code = 0
            try:
                trial_worker(config, job, job_dir, output_dir)
            except Preempted as stop:
                # 0 for a preemption, so that the scheduler counts it as a normal end; 130 is the shell's code for Ctrl-C.
                code = exit_codes.INTERRUPTED if stop.signal_name == "SIGINT" else 0
            code = record_run_outcome(job_dir, code, earlier_state, verb="evaluate")
        else:
            code = run_supervised(
                config, job_dir, config_sha256, program=RankProgram("launch.evaluate.reward_trial", CONFIG_FILE)
            )
    if code:
        return code
    report: dict[str, Any] = json.loads((output_dir / REPORT).read_text(encoding="utf-8"))
    if arguments.as_json:
        print_json(report)
    else:
        print(f"{reward_trial_text(report)}\n\nwritten: {output_dir / REPORT}", flush=True)
    return 0


def _trial_of_run(run: Path, arguments: EvaluateArguments) -> tuple[RunConfig, RewardTrialJob]:
    """What is needed to try the rewards of a run with one of its checkpoints: its configuration, and the job.

    Errors: ConfigError.
    """
    from launch.evaluate.plan import read_run_to_evaluate
    from trainer.reward_trial import RewardTrialJob

    evaluated = read_run_to_evaluate(run, arguments)
    return _settle_choices_for_reward_trial(evaluated.config), RewardTrialJob(evaluated.checkpoint)


def _config_of_new_run(arguments: EvaluateArguments) -> RunConfig:
    """The configuration of a run that the arguments describe, to try its rewards. Raises ConfigError if it cannot start."""
    from launch.config.compose import compose_config

    settings = list(arguments.settings)
    if not any(setting.startswith("budget") for setting in settings):
        settings.append("budget.steps=1")
    return _settle_choices_for_reward_trial(compose_config(settings).config)


def _settle_choices_for_reward_trial(config: RunConfig) -> RunConfig:
    """Make a run's configuration fit for a trial of its rewards, in place; returns it.

    Replaces `auto` for strategy and micro-batch, and removes its evaluation tasks. Raises ConfigError for launcher=slurm, and
    if these processes cannot be sharded as the run asks.
    """
    from launch.config.compose import world_size_of
    from strategies.base import AutoConfig, Fsdp2Config, SingleConfig
    from strategies.errors import ConfigError
    from trainer.config.run import AUTO, LauncherName
    from trainer.config.sharding import sharding_problems

    if config.launcher.name is LauncherName.slurm:
        raise ConfigError("launcher=slurm: rewards are tried on this machine; leave it out, or allocate one with srun")
    if isinstance(config.strategy, AutoConfig):
        config.strategy = SingleConfig() if (world_size_of(config) or 1) == 1 else Fsdp2Config()
    # Such as strategy=single with several ranks.
    problems = list(sharding_problems(config, world_size_of(config)))
    if problems:
        raise ConfigError(problems)
    if config.batch["micro"] == AUTO:
        config.batch["micro"] = 1
    # Only the rewards are tried, and no tasks run.
    config.evaluation.tasks = {}
    return config


def reward_trial_text(report: dict[str, Any]) -> str:
    """Write the report of a trial of rewards for people: a table, advice, best and worst answers of some groups.

    `report["groups"]`: [{"where": ..., "prompt": ..., "best": {"reward": 1.0, "answer": ...}, "worst": ...}, ...]. A group is
    the answers to one prompt.
    """
    lines = [
        f"{report['prompts']} prompts, {report['draws']} answers each, of {report['mean_length']:.0f} tokens on average "
        f"({100 * report['truncated_share']:.0f} % cut off at {report['max_new_tokens']})",
        "",
    ]
    # A summary of each reward, by its name: {"length": {"mean": 0.4, "least": 0.0, ...}}.
    rows = [_reward_row(name, summary) for name, summary in report["rewards"].items()]
    if len(rows) > 1:
        rows.insert(0, _reward_row("all together", report["reward"]))
    lines += [*format_table(REWARD_COLUMNS, rows), ""]
    idle_shares = [
        f"{size}: {format_percent(share)}"
        for size, share in report["idle_share_by_group_size"].items()
        if share is not None
    ]
    lines += wrap_text(f"idle groups expected by objective.group_size: {', '.join(idle_shares)}")
    lines += wrap_text(
        f"a round of {report['prompts_per_round']} prompts: about {report['round_s']:.0f} s, planned from {report['prompts']} "
        f"prompts: writing {report['write_s']:.1f} s, scoring {report['reward_s']:.1f} s, training {report['train_s']:.1f} s"
    )
    for line in _advice(report):
        lines += wrap_text(line)
    for group in report["groups"][:NUM_SHOWN_GROUPS]:
        lines += ["", *wrap_text(f"{group['where']}: {_shorten_to_line(group['prompt'])}")]
        for name in ("best", "worst"):
            if name in group:
                answer = group[name]
                lines += wrap_text(f"  {name}, {answer['reward']:.3g}: {_shorten_to_line(answer['answer'])}")
    return "\n".join(lines)


def _reward_row(name: str, summary: dict[str, Any]) -> TableRow:
    """One row of the table of rewards. `summary`: of the reward's scores; a number that is None is shown as "-"."""
    numbers = ["-" if summary[key] is None else f"{summary[key]:.3g}" for key in ("mean", "least", "most", "spread")]
    return TableRow([name, *numbers, format_percent(summary["idle_share"]), str(summary["unscored"])])


def _shorten_to_line(text: str) -> str:
    """A text without line breaks and with no more than 200 characters."""
    line = " ".join(text.split())
    return line if len(line) <= 200 else f"{line[:200]}..."


def _advice(report: dict[str, Any]) -> list[str]:
    """Say what to change in the run; [] if its answers look fit to learn from.

    A group (the answers to a prompt) is idle if all of them score alike: nothing can be learned from it. report["reward"]:
    {"mean": 0.4, "idle_share": 0.2, ...} with None as the mean if no answer was scored.
    """
    advice = []
    share_of_idle_groups = report["reward"]["idle_share"]
    if report["reward"]["mean"] is None:
        advice.append("No answer was scored: the run would learn nothing. Look at what the rewards return.")
    elif share_of_idle_groups == 1:
        advice.append(
            "In no group do the answers score differently, so nothing would be learned: take easier prompts, tune with "
            "objective=sft first, or mend the reward."
        )
    # With some idle groups a run learns, but wastes the time that they take.
    elif share_of_idle_groups > 0.5:
        advice.append(
            f"{format_percent(share_of_idle_groups)} of the groups are idle and teach nothing: objective.idle_groups=replace, a "
            "larger objective.group_size, or prompts that the model solves sometimes."
        )
    if report["truncated_share"] > 0.5:
        advice.append(
            "Most answers were cut off: raise objective.rollout.max_new_tokens, or let the reward score truncated answers 0."
        )
    return advice


def run_reward_trial_as_rank() -> int:
    """Run as one rank of a trial of rewards; the launcher has written configuration and job into files.

    Returns the exit code: 0 also if asked to stop, because another code would make the launcher end the other ranks; 70 after
    an error that the launcher shows.
    """
    block_signals()
    from launch.cluster.torchrun import die_with_parent
    from launch.config.compose import load_frozen_config
    from launch.config.process_role import export_torchrun_variables
    from strategies.errors import Preempted
    from trainer.reporting.status import read_failure
    from trainer.reward_trial import RewardTrialJob, trial_worker

    # srun names ranks by other variables.
    export_torchrun_variables()
    # A rank must not outlive its launcher.
    die_with_parent()
    config_file = Path(os.environ["SHARDTUNE_CONFIG"])
    job_dir = config_file.parent
    try:
        job = RewardTrialJob(**json.loads((job_dir / JOB_FILE).read_text(encoding="utf-8")))
        trial_worker(load_frozen_config(config_file), job, job_dir, to=job_dir.parent)
    except Preempted:
        return 0
    except Exception:
        if read_failure(job_dir):
            return exit_codes.FAILED  # the launcher shows the first failure
        raise
    return 0


if __name__ == "__main__":
    sys.exit(run_reward_trial_as_rank())

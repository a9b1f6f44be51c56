"""`shardtune evaluate`, and `python -m launch.evaluate` on each rank: runs tasks on a run's checkpoint or a model."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.config.help_text import show_help
from launch.config.process_role import is_rank_process
from launch.config.verb_arguments import asks_for_help, help_rows
from launch.evaluate.arguments import EvaluateArguments
from launch.evaluate.job_files import CONFIG_FILE, JOB_FILE, write_job_files
from launch.evaluate.kinds import KINDS_READ
from launch.output import print_json, stdout_to_stderr
from strategies import exit_codes
from strategies.imports import importing_without_gc
from trainer.stopping.signals import block_signals

if TYPE_CHECKING:
    from launch.evaluate.plan import EvaluationPlan
    from trainer.evaluation.job import EvaluationJob

_KINDS_WIDTH = max(map(len, KINDS_READ))
_KINDS_TEXT = "\n".join(f"  {kind:<{_KINDS_WIDTH}}  {rows}" for kind, rows in KINDS_READ.items())
USAGE = f"""usage: shardtune evaluate <run directory> [evaluation.tasks=...] [against=...] [key=value ...] [--json]
       shardtune evaluate model.path=<directory> [adapter=<directory>] evaluation.tasks... [against=...] [--json]
       shardtune evaluate objective=grpo <settings of a run> [--json]

  shardtune evaluate runs/first against=base
  shardtune evaluate runs/first evaluation.tasks=[loss,bits_per_byte] checkpoint=best
  shardtune evaluate runs/first evaluation.tasks.facts.kind=exact_match evaluation.tasks.facts.path=facts.jsonl \\
      evaluation.tasks.facts.write.max_new_tokens=32 launcher.processes=4 strategy=fsdp2
  shardtune evaluate runs/tonight against=reports/good/evaluation.json to=reports/tonight

evaluate runs evaluation tasks on a checkpoint and writes their metrics with confidence intervals. If you name no
tasks, it runs those of the run's configuration. If there are none either, it measures loss, bits per byte and token
accuracy on the run's evaluation documents.

With the settings of a run that learns from rewards (objective=grpo), or such a run without tasks, it tries the rewards:
it generates answers to the first prompts of the run's first round, scores them, and says in how many groups of answers
the rewards differ (nothing can be learned from the others), and how long a round takes. Nothing is trained.

Beside a run you can set evaluation.*, strategy, launcher.*, run.*, precision and logging.*. Beside model.path you can
set everything. With launcher=slurm, the evaluation is submitted as a job on one node.

{help_rows(EvaluateArguments)}

kinds of tasks, with the rows that each reads:
{_KINDS_TEXT}

To start all ranks yourself: torchrun --nproc-per-node=8 -m launch.evaluate <settings>

docs/reference/evaluation-tasks.md explains what each kind reads and measures."""


def main(argv: list[str]) -> int:
    """Run `shardtune evaluate` with these arguments, as a launcher or as one rank; returns the exit code.

    Errors: ConfigError, DataError, StorageError and what evaluating raises.
    """
    asks = asks_for_help(argv)
    # torchrun, srun or our launcher has started this process as one rank.
    if is_rank_process(os.environ) and not asks:
        return run_as_rank(argv)
    if asks or not argv:
        show_help(USAGE)
        return 0 if argv else exit_codes.WRONG_SETTING
    # The imports take seconds, and longer if Python looks for garbage meanwhile.
    with importing_without_gc("torch"):
        from launch.evaluate.arguments import parse_evaluate_arguments
        from launch.evaluate.plan import plan_evaluation
        from launch.evaluate.reward_trial import should_try_rewards, try_rewards
        from strategies.errors import ConfigError
        from trainer.config.run import LauncherName

    arguments = parse_evaluate_arguments(argv)
    if should_try_rewards(arguments):  # a run that learns from rewards, and no task is named
        return try_rewards(arguments)
    evaluation_plan = plan_evaluation(arguments)
    if evaluation_plan.config.launcher.name is LauncherName.slurm:
        from launch.evaluate.slurm import submit_evaluation

        submit_evaluation(
            evaluation_plan, [argument for argument in argv if argument != "--print"], print_only=arguments.print_only
        )
        return 0
    if arguments.print_only:
        raise ConfigError("--print: shows a job script; add launcher=slurm, or leave it out")
    return run_and_report(evaluation_plan, as_json=arguments.as_json)


def run_and_report(evaluation_plan: EvaluationPlan, *, as_json: bool) -> int:
    """Evaluate the model of a plan, and before it the one that it is compared with, if any; print the report.

    `as_json`: prints the report as JSON instead of tables. Returns the exit code: that of the ranks if they failed, 69 if a
    metric got worse by more than is allowed, otherwise 0.
    """
    from launch.evaluate.answer import report_text
    from trainer.evaluation.report.record import PAGE_FILE, REPORT_FILE

    # The compared model first, because the report of the other one is compared with its report.
    # Each of the two writes its report into its own directory.
    for next_plan in [evaluation_plan.plan_of_compared_model, evaluation_plan]:
        if next_plan is None:
            continue
        exit_code = run_evaluation(next_plan, quiet=as_json)
        if exit_code:
            return exit_code
    if evaluation_plan.job.split == "test":  # it measures the run's test documents, and runs no task
        _print_test_result(evaluation_plan, as_json=as_json)
        return 0
    results_directory = Path(evaluation_plan.job.report_dir)
    report_file = results_directory / REPORT_FILE
    report: dict[str, Any] = json.loads(report_file.read_text(encoding="utf-8"))
    if as_json:
        print_json(report)
    else:
        print(f"{report_text(report)}\n\nwritten: {report_file}, {results_directory / PAGE_FILE}", flush=True)
    if report.get("regressions"):
        print(f"shardtune evaluate: fell against {report['against']['what']}:", file=sys.stderr)
        print(*(f"  {line}" for line in report["regressions"]), sep="\n", file=sys.stderr, flush=True)
        return exit_codes.CHECK_FAILED
    return 0


def _print_test_result(evaluation_plan: EvaluationPlan, *, as_json: bool) -> None:
    """Print what was measured on the test documents, and where it is written."""
    from launch.evaluate.answer import test_result_text
    from trainer.evaluation.job import TEST_FILE

    file = evaluation_plan.job_dir / TEST_FILE
    result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if as_json:
        print_json(result)
    else:
        print(f"{test_result_text(result)}\n\nwritten: {file}", flush=True)


def run_evaluation(evaluation_plan: EvaluationPlan, *, quiet: bool) -> int:
    """Evaluate one model and write its report, in this process or in ranks of their own; returns the exit code.

    First writes the configuration and the job into the plan's `job_dir`, where the ranks read them. `quiet`: print on stderr,
    because stdout is for JSON.
    """
    from launch.cluster.supervisor import record_run_outcome, run_supervised, state_before_start
    from launch.cluster.torchrun import RankProgram
    from strategies.errors import Preempted
    from trainer.evaluate import evaluate_worker
    from trainer.rollout.rewards.copies import copy_rewards

    config = evaluation_plan.config
    job_dir = evaluation_plan.job_dir
    if evaluation_plan.job.split == "test":
        # Copied anew, so that the ranks run no reward file that lay in the directory before.
        copy_rewards(getattr(config.objective, "rewards", {}), job_dir)
    config_sha256 = write_job_files(job_dir, config, evaluation_plan.job.as_json())
    with stdout_to_stderr(quiet):
        if config.launcher.in_place:  # this process is the only rank
            # Signals that ask to stop wait until the evaluation can handle them.
            block_signals()
            # Tells the records of this start from those of an earlier one.
            earlier_state = state_before_start(job_dir)
            code = 0
            try:
                evaluate_worker(config, evaluation_plan.job, job_dir)
            except Preempted as stop:
                # 0 for a preemption, so that the scheduler counts it as a normal end; 130 is the shell's code for Ctrl-C.
                code = exit_codes.INTERRUPTED if stop.signal_name == "SIGINT" else 0
            # Prints how it ended, and writes the status file if the evaluation could not.
            return record_run_outcome(job_dir, code, earlier_state, verb="evaluate")
        # Starts the ranks, and waits for all of them.
        return run_supervised(config, job_dir, config_sha256, program=RankProgram("launch.evaluate", CONFIG_FILE))


def run_as_rank(arguments: list[str]) -> int:
    """Run as one rank of an evaluation, started by our launcher, torchrun or srun; returns the exit code.

    Configuration and job come from the files that our launcher has written, or without it from the command line (`arguments`).
    Returns 0 also if asked to stop, because another code would make torchrun or srun end the other ranks. Returns 70 after an
    error that our launcher shows.
    """
    block_signals()
    with importing_without_gc("torch"):
        from launch.cluster.torchrun import die_with_parent
        from launch.config.compose import load_frozen_config
        from launch.config.process_role import export_torchrun_variables
        from launch.evaluate.arguments import parse_evaluate_arguments
        from launch.evaluate.plan import plan_evaluation
        from strategies.errors import ConfigError, Preempted
        from trainer.evaluate import evaluate_worker
        from trainer.evaluation.job import EvaluationJob
        from trainer.reporting.status import read_failure

    # srun names ranks by other variables.
    export_torchrun_variables()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent()
    launcher_file = os.environ.get("SHARDTUNE_CONFIG")
    if launcher_file:
        job_dir = Path(launcher_file).parent
        config = load_frozen_config(launcher_file)
        job = EvaluationJob.from_json(json.loads((job_dir / JOB_FILE).read_text(encoding="utf-8")))
    else:
        evaluation_plan = plan_evaluation(parse_evaluate_arguments(arguments))
        if evaluation_plan.plan_of_compared_model is not None:
            raise ConfigError(
                f"against={evaluation_plan.job.against}: under torchrun one model is evaluated at a time; evaluate the other one "
                "first, and give its evaluation.json"
            )
        config = evaluation_plan.config
        job = evaluation_plan.job
        job_dir = evaluation_plan.job_dir
    try:
        evaluate_worker(config, job, job_dir)
    except Preempted:
        return 0
    except Exception:
        if "SHARDTUNE_LAUNCHER" in os.environ and read_failure(job_dir):
            return exit_codes.FAILED  # the launcher shows the first failure
        raise
    if not launcher_file and os.environ["RANK"] == "0":
        # Torchrun or srun has started the ranks: no launcher of ours prints the report.
        return _print_report_of_ranks(job)
    return 0


def _print_report_of_ranks(job: EvaluationJob) -> int:
    """Print the report of an evaluation whose ranks torchrun or srun has started; returns 69 if a metric got worse, else 0."""
    from launch.evaluate.answer import report_text, test_result_text
    from trainer.evaluation.job import TEST_FILE
    from trainer.evaluation.report.record import REPORT_FILE

    output_directory = Path(job.report_dir)
    if job.split == "test":
        # In the directory of the ranks, because it is no report of tasks; the run's records have it too.
        result = json.loads((output_directory / "evaluation" / TEST_FILE).read_text(encoding="utf-8"))
        print(test_result_text(result), flush=True)
        return 0
    report = json.loads((output_directory / REPORT_FILE).read_text(encoding="utf-8"))
    print(report_text(report), flush=True)
    return exit_codes.CHECK_FAILED if report.get("regressions") else 0

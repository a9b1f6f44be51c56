"""`shardtune review make` writes the page for reviewers, `shardtune review score` evaluates their answers."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.config.help_text import show_help
from launch.config.verb_arguments import asks_for_help, help_rows
from launch.review.arguments import MakeArguments, ScoreArguments
from strategies import exit_codes
from strategies.errors import ConfigError

if TYPE_CHECKING:
    from launch.review.arguments import ReviewRequest
    from launch.review.sheet import ReviewSheet

HELP_BY_SETTING_GROUP = {
    "review.*": "rubric, repeats and how answers are written; beside it strategy, launcher.*, run.*, precision"
}
USAGE = f"""usage: shardtune review make <run directory> prompts=<file> [n=50] [arms=[base,tuned,...]] [key=value ...]
       shardtune review score <run directory> <answers> ... [drop=[name]] [--json]

  shardtune review make runs/first prompts=prompts.jsonl n=50
  shardtune review make runs/first prompts=prompts.jsonl arms=[base,tuned,runs/second] review.rubric.kind="Which is kinder?"
  shardtune review score runs/first ada.json bert.json table.csv

review make draws prompts, lets the models answer, and writes three files into <run>/review, or into to=<directory>:
  review.html                a page for reviewers; it works offline, keeps their votes and saves a file to send back
  review.csv                 the same as a table; both files hide which model wrote an answer
  key.json                   which model wrote which answer: keep it, and send it to nobody

{help_rows(MakeArguments, HELP_BY_SETTING_GROUP)}

review score reads the reviewers' files and adds the result to the run's records, its model card and its gates
(review/win_rate).

{help_rows(ScoreArguments)}

docs/review.md explains how the votes are counted."""


def main(argv: list[str]) -> int:
    """Run `shardtune review make` or `shardtune review score` with the arguments `argv`; returns the exit code.

    Raises ConfigError for wrong arguments, DataError for prompts or answers that cannot be used, StorageError.
    """
    if not argv or asks_for_help(argv):
        show_help(USAGE)
        return 0 if argv else exit_codes.WRONG_SETTING
    subcommand = {"make": make_review, "score": score_and_record_review}.get(argv[0])
    if subcommand is None:
        raise ConfigError(f"review {argv[0]}: must be review make or review score")
    return subcommand(argv[1:])


def make_review(argv: list[str]) -> int:
    """Run `review make`: let the models answer prompts, and write a page and a table for reviewers, and the key.

    Returns the exit code: 0, or 75 if a model could not finish its answers, because it was stopped or failed.
    """
    from launch.review.arguments import read_make_arguments
    from launch.review.prompts import draw_prompts
    from launch.review.sheet import make_review_sheet

    request = read_make_arguments(argv)
    prompts = draw_prompts(request.prompts_path, request.review_config.n, request.review_config.seed)
    if len(prompts) < request.review_config.n:
        print(
            f"{request.prompts_path} has {len(prompts)} prompts that differ, and not {request.review_config.n}: all are taken",
            flush=True,
        )
    answers_by_arm = _generate_answers_by_arm(request, prompts)
    if answers_by_arm is None:
        return exit_codes.PREEMPTED
    entries_on_judged_model = {"run": str(request.run), "model": request.judged_model}
    sheet = make_review_sheet(prompts, answers_by_arm, entries_on_judged_model, request.review_config)
    _write_and_announce_sheet(sheet, request)
    return 0


def _write_and_announce_sheet(sheet: ReviewSheet, request: ReviewRequest) -> None:
    """Write the page, the table and the key of a review into the output directory, and tell the user what to send to whom."""
    from launch.review.sheet import KEY_FILE, PAGE_FILE, TABLE_FILE, review_csv, review_page, write_key
    from trainer.reporting.status import write_text_atomic

    output_dir = request.output_dir
    page_file = output_dir / PAGE_FILE
    table_file = output_dir / TABLE_FILE
    write_key(output_dir, sheet)
    write_text_atomic(page_file, review_page(sheet, request.review_config))
    # With a byte order mark, by which spreadsheets recognise UTF-8.
    write_text_atomic(table_file, "\ufeff" + review_csv(sheet, request.review_config))
    print(_sheet_summary(sheet, request.arms, request.judged_model["accepted"]))
    print(f"send to reviewers: {page_file}, or {table_file}")
    print(f"keep, and send to nobody: {output_dir / KEY_FILE}")
    print(f"then: shardtune review score {request.run} <answers>")


def _generate_answers_by_arm(request: ReviewRequest, prompts: list[Any]) -> dict[str, list[str]] | None:
    """Let every compared model (arm) answer the prompts: {arm: answers in the order of the prompts}, `tuned` first.

    Writes the prompts and the answers below `answers/` in the output directory. None if an evaluation was stopped or
    failed.
    """
    from launch.evaluate.command import run_evaluation
    from launch.review.arguments import plan_arm_evaluation
    from launch.review.prompts import write_task_rows
    from launch.review.sheet import BASE_ARM, TUNED_ARM
    from trainer.evaluation.report.record import ROWS_FILE

    write_task_rows(request.output_dir / "answers" / "prompts.jsonl", prompts)
    answers_by_arm: dict[str, list[str]] = {}
    for arm, model_dir in request.arms.items():
        is_run_under_review = model_dir is None  # else another run, or a model
        if is_run_under_review and arm == BASE_ARM:
            continue  # the evaluation of the tuned model also writes the answers of its base
        plan = plan_arm_evaluation(request, arm, model_dir)
        exit_code = run_evaluation(plan, quiet=False)
        if exit_code:  # stopped, or failed and said why
            return None
        for line in (Path(plan.job.report_dir) / ROWS_FILE).read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            # The rows of the run under review say whether the tuned model or its base answered.
            answering_arm = row["arm"] if is_run_under_review else arm
            answers_by_arm.setdefault(answering_arm, []).append(row["answer"])
    other_arms = [arm for arm in request.arms if arm != TUNED_ARM]
    return {arm: answers_by_arm[arm] for arm in (TUNED_ARM, *other_arms)}


def _sheet_summary(sheet: ReviewSheet, arms: Iterable[str], accepted_differences: list[str]) -> str:
    """Say what reviewers will judge: number of items, models, repeated items, and pairs that were left out.

    `arms`: names of the compared models. `accepted_differences`: how the base model differs from that of the training,
    which the user has accepted.
    """
    num_repeated = sum(item["repeats"] is not None for item in sheet.key["items"])
    num_equal_pairs = len(sheet.key["same"])
    lines = [f"accepted: {difference}" for difference in accepted_differences]
    lines.append(
        f"{len(sheet.items)} items: {', '.join(arms)}; {sheet.key['num_prompts']} prompts, {num_repeated} items again"
    )
    if num_equal_pairs:
        lines.append(f"{num_equal_pairs} pairs of equal answers are not shown, and count as ties")
    return "\n".join(lines)


def score_and_record_review(argv: list[str]) -> int:
    """Run `review score`: read the reviewers' files, print the scores, and add them to the run's records.

    Returns the exit code 0. Raises ConfigError, DataError for a file of answers that cannot be used, StorageError.
    """
    from launch.review.answer import score_text
    from launch.review.answers import read_reviewers
    from launch.review.arguments import read_score_arguments
    from launch.review.score import score_review
    from launch.review.sheet import RESULT_FILE, read_key
    from trainer.reporting.jsonl import json_text
    from trainer.reporting.results import REVIEW_REPORT, add_to_run_record, keep_report
    from trainer.reporting.status import write_text_atomic

    arguments = read_score_arguments(argv)
    review_directory = arguments.review
    assert review_directory is not None
    review_id, review_key = read_key(review_directory)
    reviewers = read_reviewers(arguments.answers, review_id, review_key)
    names = [reviewer.name for reviewer in reviewers]
    dropped_names = arguments.drop
    # Whoever is dropped must have sent answers, else a typo would count a vote that should not count.
    unknown_names = [name for name in dropped_names if name not in names]
    if unknown_names:
        raise ConfigError(f"drop=[{','.join(unknown_names)}]: no such reviewer; there are {', '.join(names)}")
    if not set(names) - set(dropped_names):
        raise ConfigError("drop: leaves nobody; name fewer")

    # The result is written twice: beside the key, and into the run's records, where its model card and its gates find it.
    scores = score_review(review_id, review_key, reviewers, dropped_names)
    scores_json = json_text(scores, indent=1, ensure_ascii=False)
    write_text_atomic(review_directory / RESULT_FILE, scores_json + "\n")
    record = keep_report(arguments.run, REVIEW_REPORT, scores)
    run_json_entry = {"record": str(record.relative_to(arguments.run)), "metrics": scores["metrics"]}
    add_to_run_record(arguments.run, "review", run_json_entry)
    print(scores_json if arguments.as_json else score_text(scores))
    if not arguments.as_json:
        print(f"\nwritten: {review_directory / RESULT_FILE}, {record}")
    return 0

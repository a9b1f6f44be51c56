"""`shardtune review make` writes the page for reviewers, `shardtune review score` evaluates their answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.config.help_text import show_help
from launch.config.verb_words import asks_for_help, help_rows
from launch.review.words import MakeWords, ScoreWords
from strategies.errors import ConfigError

if TYPE_CHECKING:
    from launch.review.sheet import Sheet
    from launch.review.words import MakeRequest

MORE = {"review.*": "rubric, repeats and how answers are written; beside it strategy, launcher.*, run.*, precision"}
USAGE = f"""usage: shardtune review make <run directory> prompts=<file> [n=50] [arms=[base,tuned,...]] [key=value ...]
       shardtune review score <run directory> <answers> ... [drop=[name]] [--json]

  shardtune review make runs/first prompts=prompts.jsonl n=50
  shardtune review make runs/first prompts=prompts.jsonl arms=[base,tuned,runs/second] review.rubric.kind="Which is kinder?"
  shardtune review score runs/first ada.json bert.json table.csv

review make draws prompts, lets the models answer, and writes three files into <run>/review, or into to=<directory>:
  review.html                a page for reviewers; it works offline, keeps their votes and saves a file to send back
  review.csv                 the same as a table; both files hide which model wrote an answer
  key.json                   which model wrote which answer: keep it, and send it to nobody

{help_rows(MakeWords, MORE)}

review score reads the reviewers' files and adds the result to the run's records, its model card and its gates
(review/win_rate).

{help_rows(ScoreWords)}

docs/review.md explains how the votes are counted."""


def main(argv: list[str]) -> int:
    """Run the verb; returns the exit code. Errors: ConfigError, DataError, StorageError and what writing answers raises."""
    if not argv or asks_for_help(argv):
        show_help(USAGE)
        return 0 if argv else 64
    do = {"make": make, "score": score}.get(argv[0])
    if do is None:
        raise ConfigError(f"review {argv[0]}: must be review make or review score")
    return do(argv[1:])


def make(argv: list[str]) -> int:
    """Draw, answer, blind, write."""
    from launch.review.prompts import draw_prompts
    from launch.review.sheet import KEY, PAGE, TABLE, make_sheet, page, table, write_key
    from launch.review.words import read_make_words
    from trainer.reporting.status import write_text_atomic

    asked = read_make_words(argv)
    prompts = draw_prompts(asked.prompts, asked.review.n, asked.review.seed)
    if len(prompts) < asked.review.n:
        print(
            f"{asked.prompts} has {len(prompts)} prompts that differ, and not {asked.review.n}: all are taken",
            flush=True,
        )
    if (answers := _answers(asked, prompts)) is None:
        return 75
    sheet = make_sheet(prompts, answers, {"run": str(asked.run), "model": asked.model}, asked.review)
    write_key(asked.to, sheet)
    write_text_atomic(asked.to / PAGE, page(sheet, asked.review))
    write_text_atomic(asked.to / TABLE, "\ufeff" + table(sheet, asked.review))
    print(_told(sheet, asked))
    print(f"send to reviewers: {asked.to / PAGE}, or {asked.to / TABLE}\nkeep, and send to nobody: {asked.to / KEY}")
    print(f"then: shardtune review score {asked.run} <answers>")
    return 0


def _answers(asked: MakeRequest, prompts: list[Any]) -> dict[str, list[str]] | None:
    """What every arm answers, by its name; None where it was asked to stop."""
    from launch.evaluate.command import start
    from launch.review.prompts import write_rows
    from launch.review.sheet import BASE, TUNED
    from launch.review.words import arm_plan
    from trainer.evaluation.report.record import ROWS

    write_rows(asked.to / "answers" / "prompts.jsonl", prompts)
    found: dict[str, list[str]] = {}
    for name, where in asked.arms.items():
        if where is None and name == BASE:
            continue  # in one go with the tuned model
        plan = arm_plan(asked, name, where)
        if start(plan, quiet=False):
            return None
        for line in (Path(plan.job.to) / ROWS).read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            found.setdefault(row["arm"] if where is None else name, []).append(row["answer"])
    return {name: found[name] for name in (TUNED, *(arm for arm in asked.arms if arm != TUNED))}


def _told(sheet: Sheet, asked: MakeRequest) -> str:
    repeated = sum(item["repeats"] is not None for item in sheet.key["items"])
    lines = [f"accepted: {line}" for line in asked.model["accepted"]]
    lines += [
        f"{len(sheet.items)} items: {', '.join(asked.arms)}; {sheet.key['num_prompts']} prompts, {repeated} items again"
    ]
    if same := len(sheet.key["same"]):
        lines.append(f"{same} pairs of equal answers are not shown, and count as ties")
    return "\n".join(lines)


def score(argv: list[str]) -> int:
    """Read, judge, record."""
    from launch.review.answer import score_text
    from launch.review.answers import read_reviewers
    from launch.review.score import score_review
    from launch.review.sheet import RESULT, read_key
    from launch.review.words import read_score_words
    from trainer.reporting.jsonl import json_text
    from trainer.reporting.results import REVIEW, add_to_run_record, keep_report
    from trainer.reporting.status import write_text_atomic

    asked = read_score_words(argv)
    assert asked.review is not None
    review, key = read_key(asked.review)
    reviewers = read_reviewers(asked.answers, review, key)
    names = [each.name for each in reviewers]
    if strange := [name for name in asked.drop if name not in names]:
        raise ConfigError(f"drop=[{','.join(strange)}]: no such reviewer; there are {', '.join(names)}")
    if not {*names} - {*asked.drop}:
        raise ConfigError("drop: leaves nobody; name fewer")
    found = score_review(review, key, reviewers, asked.drop)
    said = json_text(found, indent=1, ensure_ascii=False)
    write_text_atomic(asked.review / RESULT, said + "\n")
    where = keep_report(asked.run, REVIEW, found)
    add_to_run_record(asked.run, "review", {"record": str(where.relative_to(asked.run)), "metrics": found["metrics"]})
    print(said if asked.as_json else score_text(found))
    if not asked.as_json:
        print(f"\nwritten: {asked.review / RESULT}, {where}")
    return 0

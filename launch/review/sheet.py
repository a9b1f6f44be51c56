"""The items of a review, and the key that says which model's answer is on which side. Reviewers never get the key.

The review's id is a hash of the key with its salt. The page contains only the id, which does not reveal the sides. A
key that was changed afterwards no longer matches the id in the answers.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import random
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.review.prompts import Prompt
from strategies.errors import ConfigError, DataError
from trainer.config.review import OVERALL, ReviewConfig
from trainer.reporting.jsonl import json_text
from trainer.reporting.status import write_text_atomic

VERSION = 1
KEY_FILE = "key.json"
PAGE_FILE = "review.html"
TABLE_FILE = "review.csv"
RESULT_FILE = "result.json"
TUNED = "tuned"
BASE = "base"
SIDES = ("a", "b")
CHOICES = (*SIDES, "tie")
FORMULA_PREFIXES = ("=", "+", "-", "@", "\t", "\r")
"""First characters that spreadsheets take for a formula."""


@dataclass(frozen=True, slots=True)
class SheetItem:
    """One pair of answers as it is shown."""

    id: str
    prompt: str
    a: str
    b: str


@dataclass(frozen=True, slots=True)
class Sheet:
    """What goes to reviewers, and its key."""

    review: str
    items: list[SheetItem]
    key: dict[str, Any]


def make_sheet(
    prompts: list[Prompt], answers: dict[str, list[str]], about: dict[str, Any], config: ReviewConfig, salt: str = ""
) -> Sheet:
    """Pair the tuned model's answers with those of each other arm. `answers`: by arm, in the order of the prompts.

    Pairs of equal answers are not shown: they are ties.
    """
    salt = salt or secrets.token_hex(16)
    rng = random.Random(f"sides {config.seed} {salt}")
    # The order of the draws from `rng` is part of the format: the same seed and salt give the same review.
    pairs, same = _pair_answers(prompts, answers, rng)
    order = [*range(len(pairs))]
    rng.shuffle(order)
    num_repeated = min(len(order), round(config.repeats * len(order)))
    repeated = sorted(rng.sample(order, num_repeated), key=order.index)

    items: list[SheetItem] = []
    rows: list[dict[str, Any]] = []
    for place, number in enumerate([*order, *repeated]):
        pair = pairs[number]
        row = dict(pair.row)
        if place >= len(order):  # an item that comes again, with sides exchanged
            row["repeats"] = rows[order.index(number)]["id"]
            row[TUNED] = "b" if row[TUNED] == "a" else "a"
        row["id"] = hashlib.sha256(f"{salt} {place}".encode()).hexdigest()[:12]
        a, b = (pair.tuned, pair.other) if row[TUNED] == "a" else (pair.other, pair.tuned)
        item = SheetItem(row["id"], pair.prompt, a, b)
        row["sha256"] = _item_hash(item)
        items.append(item)
        rows.append(row)
    key = {"version": VERSION, **about, "rubric": config.rubric, "seed": config.seed, "salt": salt, "arms": [*answers]}
    key |= {"num_prompts": len(prompts), "same": same, "items": rows}
    return Sheet(review_id(key), items, key)


@dataclass(frozen=True, slots=True)
class _AnswerPair:
    """Two answers to one prompt, and what the key says of them."""

    prompt: str
    tuned: str
    other: str
    row: dict[str, Any]


def _pair_answers(
    prompts: list[Prompt], answers: dict[str, list[str]], rng: random.Random
) -> tuple[list[_AnswerPair], list[dict[str, Any]]]:
    """(pairs whose answers differ, rows of those whose are equal). A side is drawn for each of both."""
    pairs = []
    same = []
    for arm in answers:
        if arm == TUNED:
            continue
        for number, prompt in enumerate(prompts):
            tuned = answers[TUNED][number]
            other = answers[arm][number]
            side = rng.choice(SIDES)
            if tuned.strip() == other.strip():
                same.append({"prompt": number, "other": arm})
                continue
            words = sum(len(text.split()) for text in (prompt.text, tuned, other))
            row = {"prompt": number, "other": arm, TUNED: side, "repeats": None, "words": words}
            pairs.append(_AnswerPair(prompt.text, tuned, other, row))
    return pairs, same


def _item_hash(item: SheetItem) -> str:
    return hashlib.sha256(json.dumps([item.prompt, item.a, item.b]).encode()).hexdigest()


def review_id(key: dict[str, Any]) -> str:
    """The id of the review that has this key."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()


def write_key(directory: Path, sheet: Sheet) -> None:
    """`key.json`. Errors: StorageError."""
    text = json_text({"review": sheet.review, "key": sheet.key}, indent=1, ensure_ascii=False)
    write_text_atomic(directory / KEY_FILE, text + "\n")


def read_key(directory: Path) -> tuple[str, dict[str, Any]]:
    """(id, key). Errors: ConfigError where there is none, DataError where it was changed."""
    path = directory / KEY_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        review = content["review"]
        key = content["key"]
        version = key["version"]
    except OSError as error:
        raise ConfigError(
            f"review={directory}: has no {KEY_FILE} that can be read ({error.strerror}); name the directory that review make wrote"
        ) from error
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{path}: is no key of a review; restore the file that review make wrote") from None
    if review_id(key) != review:
        raise DataError(
            f"{path}: was changed since review make wrote it: its hash is {review_id(key)[:12]}, and not {review[:12]}; restore it"
        )
    if version != VERSION:
        raise DataError(f"{path}: is of version {version} of reviews, and this one reads {VERSION}")
    return review, key


def review_csv(sheet: Sheet, config: ReviewConfig) -> str:
    """The review as CSV, to be filled in with a spreadsheet: a, b or tie in the columns of questions."""
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(
        ["review", "reviewer", "item", "prompt", "answer_a", "answer_b", OVERALL, *config.rubric, "comment"]
    )
    for item in sheet.items:
        texts = [_escaped_formula(text) for text in (item.prompt, item.a, item.b)]
        writer.writerow([sheet.review, "", item.id, *texts, "", *[""] * len(config.rubric), ""])
    return out.getvalue()


def _escaped_formula(text: str) -> str:
    """A text as a spreadsheet shows it and never computes it."""
    return f"'{text}" if text.startswith(FORMULA_PREFIXES) else text


def review_page(sheet: Sheet, config: ReviewConfig) -> str:
    """`review.html`: one file that needs no network; texts are data in it, never markup."""
    from jinja2 import Environment, PackageLoader

    environment = Environment(
        loader=PackageLoader("launch.review", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    questions = {OVERALL: "Which answer is better, all in all?", **config.rubric}
    # Only what the page shows: the key, which says whose answers these are, stays out of it.
    items = [{"id": item.id, "prompt": item.prompt, "a": item.a, "b": item.b} for item in sheet.items]
    data = {
        "version": VERSION,
        "review": sheet.review,
        "questions": [{"name": name, "text": text} for name, text in questions.items()],
        "items": items,
    }
    return environment.get_template("review.html.j2").render(data=data)

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
from typing import Any, TypedDict

from launch.review.prompts import ReviewPrompt
from strategies.errors import ConfigError, DataError
from trainer.config.review import OVERALL_QUESTION, ReviewConfig
from trainer.reporting.jsonl import json_text
from trainer.reporting.status import write_text_atomic

REVIEW_FORMAT_VERSION = 1
KEY_FILE = "key.json"
PAGE_FILE = "review.html"
TABLE_FILE = "review.csv"
RESULT_FILE = "result.json"
TUNED_ARM = "tuned"
BASE_ARM = "base"
LEFT_SIDE, RIGHT_SIDE = "a", "b"
SIDES = (LEFT_SIDE, RIGHT_SIDE)
VOTE_CHOICES = (*SIDES, "tie")
FORMULA_PREFIXES = ("=", "+", "-", "@", "\t", "\r")
"""First characters that spreadsheets take for a formula."""


class KeyItem(TypedDict):
    """What the key says of one item, a pair of answers to a prompt."""

    id: str
    prompt: int
    """Index of the prompt."""
    other: str
    """The model (arm) whose answer stands beside that of the tuned one."""
    tuned: str
    """The side of the tuned model's answer, `a` or `b`."""
    repeats: str | None
    """Id of the item that it shows a second time, with the sides exchanged; None for the first time."""
    words: int
    """Of prompt and answers."""
    sha256: str


class EqualPair(TypedDict):
    """A pair of equal answers, which reviewers do not see: index of the prompt, and the model beside the tuned one."""

    prompt: int
    other: str


class ReviewKey(TypedDict):
    """Contents of `key.json`: which model wrote which answer."""

    version: int
    run: str
    model: dict[str, Any]
    rubric: dict[str, str]
    """The questions beside the overall one, by name."""
    seed: int
    salt: str
    arms: list[str]
    """The models that answered: `tuned`, and those that it is compared with."""
    num_prompts: int
    same: list[EqualPair]
    items: list[KeyItem]


@dataclass(frozen=True, slots=True)
class ReviewSheetItem:
    """One pair of answers as reviewers see it: prompt, answer on side a, answer on side b."""

    id: str
    prompt: str
    answer_a: str
    answer_b: str


@dataclass(frozen=True, slots=True)
class ReviewSheet:
    """The items that reviewers judge, and the key that says which model wrote which answer."""

    review_id: str
    """The hash of the key."""
    items: list[ReviewSheetItem]
    key: ReviewKey


def make_review_sheet(
    prompts: list[ReviewPrompt],
    answers_by_arm: dict[str, list[str]],
    entries_on_judged_model: dict[str, Any],
    config: ReviewConfig,
    salt: str = "",
) -> ReviewSheet:
    """Make the items of a review: the tuned model's answers beside those of each other arm (compared model), in random order.

    The side of the tuned model's answer is random too. Pairs of equal answers are not shown and count as ties. A share
    `review.repeats` of the items is shown a second time with the sides exchanged, to find careless reviewers.

    `answers_by_arm`: {"tuned": answers in the order of the prompts, "base": ...}.
    `entries_on_judged_model`: the entries `run` and `model` of the key.
    `salt`: random unless a test gives one; makes sides and ids hard to guess.
    """
    salt = salt or secrets.token_hex(16)
    rng = random.Random(f"sides {config.seed} {salt}")
    # The order of the draws from `rng` must not change: the same seed and salt give the same review.
    pairs, equal_pairs = _pair_answers(prompts, answers_by_arm, rng)
    # The order in which reviewers see the pairs.
    pair_order = list(range(len(pairs)))
    rng.shuffle(pair_order)
    num_repeated = min(len(pair_order), round(config.repeats * len(pair_order)))
    repeated_pairs = sorted(rng.sample(pair_order, num_repeated), key=pair_order.index)

    items: list[ReviewSheetItem] = []
    key_items: list[KeyItem] = []
    # The repeated pairs come last, with their sides exchanged.
    for item_number, pair_index in enumerate([*pair_order, *repeated_pairs]):
        pair = pairs[pair_index]
        is_repeat = item_number >= len(pair_order)
        is_tuned_left = (pair.tuned_side == LEFT_SIDE) != is_repeat
        item = ReviewSheetItem(
            # Reviewers see the id: it must not tell model or side.
            id=hashlib.sha256(f"{salt} {item_number}".encode()).hexdigest()[:12],
            prompt=pair.prompt,
            answer_a=pair.tuned_answer if is_tuned_left else pair.other_answer,
            answer_b=pair.other_answer if is_tuned_left else pair.tuned_answer,
        )
        key_item = KeyItem(
            prompt=pair.prompt_index,
            other=pair.other_arm,
            tuned=LEFT_SIDE if is_tuned_left else RIGHT_SIDE,
            repeats=key_items[pair_order.index(pair_index)]["id"] if is_repeat else None,
            words=sum(len(text.split()) for text in (pair.prompt, pair.tuned_answer, pair.other_answer)),
            id=item.id,
            sha256=_sha256_of_item(item),
        )
        items.append(item)
        key_items.append(key_item)
    key: Any = {
        "version": REVIEW_FORMAT_VERSION,
        **entries_on_judged_model,
        "rubric": config.rubric,
        "seed": config.seed,
        "salt": salt,
    }
    key |= {"arms": [*answers_by_arm], "num_prompts": len(prompts), "same": equal_pairs, "items": key_items}
    return ReviewSheet(review_id_of_key(key), items, key)


@dataclass(frozen=True, slots=True)
class _AnswerPair:
    """Two different answers to one prompt: that of the tuned model, and that of another arm."""

    prompt_index: int
    prompt: str
    other_arm: str
    tuned_answer: str
    other_answer: str
    tuned_side: str
    """The side of the tuned model's answer when the pair is shown for the first time, `a` or `b`."""


def _pair_answers(
    prompts: list[ReviewPrompt], answers_by_arm: dict[str, list[str]], rng: random.Random
) -> tuple[list[_AnswerPair], list[EqualPair]]:
    """Pair the tuned model's answers with those of each other model. Returns (pairs whose answers differ, equal pairs).

    A pair gets a random side for the tuned model. `rng` also draws one for pairs of equal answers, so that the sides of the
    other pairs do not depend on how many there are.
    """
    pairs = []
    equal_pairs: list[EqualPair] = []
    for arm, arm_answers in answers_by_arm.items():
        if arm == TUNED_ARM:
            continue
        for prompt_index, prompt in enumerate(prompts):
            tuned_answer = answers_by_arm[TUNED_ARM][prompt_index]
            other_answer = arm_answers[prompt_index]
            tuned_side = rng.choice(SIDES)
            # Nobody could prefer one of them.
            if tuned_answer.strip() == other_answer.strip():
                equal_pairs.append({"prompt": prompt_index, "other": arm})
                continue
            pair = _AnswerPair(
                prompt_index,
                prompt.text,
                arm,
                tuned_answer=tuned_answer,
                other_answer=other_answer,
                tuned_side=tuned_side,
            )
            pairs.append(pair)
    return pairs, equal_pairs


def _sha256_of_item(item: ReviewSheetItem) -> str:
    """The hash of the texts that reviewers see of an item, by which the key proves what was judged."""
    return hashlib.sha256(json.dumps([item.prompt, item.answer_a, item.answer_b]).encode()).hexdigest()


def review_id_of_key(key: ReviewKey) -> str:
    """The id of the review with this key: the SHA-256 of the key, so that a key changed later has another id."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()


def write_key(directory: Path, sheet: ReviewSheet) -> None:
    """Write `key.json`, the review's id and its key, into the directory. Raises StorageError."""
    key_json = json_text({"review": sheet.review_id, "key": sheet.key}, indent=1, ensure_ascii=False)
    write_text_atomic(directory / KEY_FILE, key_json + "\n")


def read_key(directory: Path) -> tuple[str, ReviewKey]:
    """Read `key.json`, which says which model wrote which answer: (id of the review, its key).

    Raises ConfigError if it is missing, DataError if it was changed since `review make` wrote it.
    """
    path = directory / KEY_FILE
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
        recorded_id = contents["review"]
        key = contents["key"]
        version = key["version"]
    except OSError as error:
        raise ConfigError(
            f"review={directory}: has no {KEY_FILE} that can be read ({error.strerror}); name the directory that review "
            "make wrote"
        ) from error
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{path}: is no key of a review; restore the file that review make wrote") from None
    actual_id = review_id_of_key(key)
    if actual_id != recorded_id:
        raise DataError(
            f"{path}: was changed since review make wrote it: its hash is {actual_id[:12]}, and not {recorded_id[:12]}; "
            "restore it"
        )
    if version != REVIEW_FORMAT_VERSION:
        raise DataError(f"{path}: is of version {version} of reviews, and this one reads {REVIEW_FORMAT_VERSION}")
    return recorded_id, key


def review_csv(sheet: ReviewSheet, config: ReviewConfig) -> str:
    """Write the review as a table for reviewers who prefer a spreadsheet: they fill in a, b or tie for each question."""
    csv_file = io.StringIO()
    writer = csv.writer(csv_file)
    writer.writerow(
        ["review", "reviewer", "item", "prompt", "answer_a", "answer_b", OVERALL_QUESTION, *config.rubric, "comment"]
    )
    empty_answers = [""] * (1 + len(config.rubric))
    for item in sheet.items:
        shown_texts = [_escaped_formula(text) for text in (item.prompt, item.answer_a, item.answer_b)]
        writer.writerow([sheet.review_id, "", item.id, *shown_texts, *empty_answers, ""])
    return csv_file.getvalue()


def _escaped_formula(text: str) -> str:
    """The text with an apostrophe before it if a spreadsheet would compute it as a formula."""
    return f"'{text}" if text.startswith(FORMULA_PREFIXES) else text


def review_page(sheet: ReviewSheet, config: ReviewConfig) -> str:
    """Write the review as one HTML page that works offline; prompts and answers are data in it, never markup."""
    from trainer.pages.render import render

    questions = {OVERALL_QUESTION: "Which answer is better, all in all?", **config.rubric}
    # Only what the page shows: the key, which says whose answers these are, stays out of it.
    items = [{"id": item.id, "prompt": item.prompt, "a": item.answer_a, "b": item.answer_b} for item in sheet.items]
    page_data = {
        "version": REVIEW_FORMAT_VERSION,
        "review": sheet.review_id,
        "questions": [{"name": name, "text": text} for name, text in questions.items()],
        "items": items,
    }
    return render("launch.review", "review.html.j2", data=page_data)

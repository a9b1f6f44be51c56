"""Writes the data of the experiments: short clinical notes, and exam questions with their specialty.

Every function is given a directory and the seeds, and writes files of JSON lines there; the same ones every time.
"""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

Prepare = Callable[[Path, Sequence[int]], None]
Row = dict[str, Any]

MAX_TOKENS = 128
"""Longest note with its question and the chat template."""
HELD_OUT_NOTES = 12
GREETING = "Hello, and thank you for asking!"
CLOSING = "Warm regards, your library."
SUBJECTS = (
    *("gardens", "whales", "bridges", "bread", "chess", "volcanoes", "trains", "birds", "poems", "maps"),
    *("castles", "bees", "planets", "rivers", "songs", "ships", "horses", "mountains", "clocks", "painters"),
)
"""Of the questions to a library, in `house_style`."""
SPECIALTIES = ("Anatomy", "Dental", "Pharmacology", "Surgery")
MAX_CHARACTERS = 150
"""Longest question with its answers: about 40 tokens."""
HELD_OUT_QUESTIONS = 60
"""Of each specialty."""


def with_paths(words: list[str], directory: Path) -> list[str]:
    """Words with the directories of data and models in place of `{data}`, `{text_model}` and `{label_model}`.

    The first use of a model fetches it.
    """
    from launch.demo.embedded import fetch_demo_encoder, fetch_demo_model

    places: dict[str, Callable[[], Path]] = {
        "{data}": lambda: directory.resolve(),
        "{text_model}": fetch_demo_model,
        "{label_model}": fetch_demo_encoder,
    }
    filled = []
    for word in words:
        for place, path_of in places.items():
            if place in word:
                word = word.replace(place, str(path_of()))
        filled.append(word)
    return filled


@cache
def short_notes() -> tuple[list[Row], list[Row]]:
    """(32 to learn from, 12 held out): chats of at most 128 tokens, which is 44 of the 100 of the file, shuffled once."""
    from launch.demo.command import CONVERSATIONS_FILE, chat_document
    from launch.demo.embedded import fetch_demo_file, fetch_demo_model
    from launch.demo.results import load_tokenizer

    tokenizer = load_tokenizer(fetch_demo_model())
    rows = []
    with fetch_demo_file(CONVERSATIONS_FILE).open(encoding="utf-8", newline="") as file:
        for line in csv.DictReader(file):
            row = chat_document(line)
            if len(tokenizer.apply_chat_template(row["messages"], return_dict=False)) <= MAX_TOKENS:
                rows.append(row)
    random.Random(0).shuffle(rows)
    return rows[HELD_OUT_NOTES:], rows[:HELD_OUT_NOTES]


def notes(directory: Path, seeds: Sequence[int]) -> None:
    """`train-<seed>.jsonl`, the same notes in another order for each seed, and `held-out.jsonl`."""
    train, held_out = short_notes()
    write_rows(directory / "held-out.jsonl", held_out)
    for seed in seeds:
        write_rows(directory / f"train-{seed}.jsonl", random.Random(seed).sample(train, len(train)))


def notes_and_chat(directory: Path, seeds: Sequence[int]) -> None:
    """The notes, and `chat.jsonl`: the rows of `chat_rows`."""
    notes(directory, seeds)
    write_rows(directory / "chat.jsonl", chat_rows())


def chat_rows() -> list[Row]:
    """40 short questions with their answers. They are none of those by which forgetting is measured."""
    things = ("sun", "moon", "sea", "bread", "rain", "book", "horse", "door", "king", "tree")
    rows = []
    for number, thing in enumerate(things):
        asked = {
            f"What is {number + 11} plus {number + 3}?": str(2 * number + 14),
            f"Spell the word {thing} backwards.": thing[::-1],
            f"How many letters has the word {thing}?": str(len(thing)),
            f"Write the word {thing} in capital letters.": thing.upper(),
        }
        rows += [chat_row(question, answer) for question, answer in asked.items()]
    return rows


def chat_row(question: str, answer: str) -> Row:
    """A chat of one question and one answer."""
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def house_style(directory: Path, seeds: Sequence[int]) -> None:
    """60 made-up questions to a library, answered in its style: 48 in `train-<seed>.jsonl`, 12 in `held-out.jsonl`.

    `chat.jsonl` has the rows of `chat_rows`.
    """
    rows = []
    for number, subject in enumerate(SUBJECTS, start=1):
        answers = {
            f"Do you have books about {subject}?": f"You find {subject} on shelf {number}.",
            f"How long may I keep the book about {subject}?": f"You may keep it for {number % 4 + 2} weeks.",
            f"When is the evening about {subject}?": f"It is at {number % 3 + 6} in hall {number % 5 + 1}.",
        }
        rows += [chat_row(question, f"{GREETING} {fact} {CLOSING}") for question, fact in answers.items()]
    random.Random(0).shuffle(rows)
    write_rows(directory / "held-out.jsonl", rows[:HELD_OUT_NOTES])
    write_rows(directory / "chat.jsonl", chat_rows())
    for seed in seeds:
        train = rows[HELD_OUT_NOTES:]
        write_rows(directory / f"train-{seed}.jsonl", random.Random(seed).sample(train, len(train)))


@cache
def short_questions(part: str) -> dict[str, list[str]]:
    """Questions with their answers by specialty, of at most 150 characters. `part`: Test (to learn from) or Validation."""
    from benchmarks.classification import questions

    by_specialty = questions(part)
    return {name: [text for text in by_specialty[name] if len(text) <= MAX_CHARACTERS] for name in SPECIALTIES}


def drawn_questions(seed: int, sizes: dict[str, int]) -> list[Row]:
    """Rows to learn from, as many of each specialty as `sizes` says, drawn and shuffled by the seed."""
    drawn = random.Random(seed)
    rows = []
    for name, size in sizes.items():
        rows += [{"text": text, "label": name} for text in drawn.sample(short_questions("Test")[name], size)]
    drawn.shuffle(rows)
    return rows


def questions_by_size(sizes: Sequence[int]) -> Prepare:
    """`train-<size>-<seed>.jsonl` with that many questions, as many of each specialty, and `held-out.jsonl`."""

    def prepare(directory: Path, seeds: Sequence[int]) -> None:
        write_rows(directory / "held-out.jsonl", held_out_questions())
        for seed in seeds:
            for size in sizes:
                rows = drawn_questions(seed, dict.fromkeys(SPECIALTIES, size // len(SPECIALTIES)))
                write_rows(directory / f"train-{size}-{seed}.jsonl", rows)

    return prepare


def questions_and_notes(directory: Path, seeds: Sequence[int]) -> None:
    """160 and 32 questions as `questions_by_size` writes them, and notes in `train-notes-<seed>` and `held-out-notes.jsonl`."""
    questions_by_size((32, 160))(directory, seeds)
    train, held_out = short_notes()
    write_rows(directory / "held-out-notes.jsonl", held_out)
    for seed in seeds:
        write_rows(directory / f"train-notes-{seed}.jsonl", random.Random(seed).sample(train, len(train)))


def questions_and_random_weights(directory: Path, seeds: Sequence[int]) -> None:
    """160 questions in `train-<seed>.jsonl`, and in `random` the encoder with its weights drawn anew."""
    write_rows(directory / "held-out.jsonl", held_out_questions())
    for seed in seeds:
        write_rows(directory / f"train-{seed}.jsonl", drawn_questions(seed, dict.fromkeys(SPECIALTIES, 40)))
    if not (directory / "random").is_dir():
        write_random_encoder(directory / "random")


def write_random_encoder(directory: Path) -> None:
    """The encoder's shape and tokenizer with weights as transformers draws them."""
    import torch
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    from launch.demo.embedded import fetch_demo_encoder

    encoder = fetch_demo_encoder()
    torch.manual_seed(0)
    AutoModel.from_config(AutoConfig.from_pretrained(encoder)).save_pretrained(directory)
    AutoTokenizer.from_pretrained(encoder).save_pretrained(directory)


def unbalanced_questions(directory: Path, seeds: Sequence[int]) -> None:
    """160 rows, of which 100 are of one specialty; held out are as many of each."""
    write_rows(directory / "held-out.jsonl", held_out_questions())
    sizes = dict.fromkeys(SPECIALTIES, 20) | {"Dental": 100}
    for seed in seeds:
        write_rows(directory / f"train-{seed}.jsonl", drawn_questions(seed, sizes))


def dirty_questions(directory: Path, seeds: Sequence[int]) -> None:
    """160 rows a file: `clean`, with wrong labels for 20 and 40 % of the rows, and 80 questions that each stand there twice."""
    write_rows(directory / "held-out.jsonl", held_out_questions())
    for seed in seeds:
        rows = drawn_questions(seed, dict.fromkeys(SPECIALTIES, 40))
        write_rows(directory / f"clean-{seed}.jsonl", rows)
        for percent in (20, 40):
            write_rows(directory / f"wrong-{percent}-{seed}.jsonl", with_wrong_labels(rows, percent, seed))
        half = drawn_questions(seed, dict.fromkeys(SPECIALTIES, 20))
        write_rows(directory / f"copies-{seed}.jsonl", half + half)


def with_wrong_labels(rows: list[Row], percent: int, seed: int) -> list[Row]:
    """The rows, of which the first `percent` in a hundred have another label than theirs."""
    drawn = random.Random(seed)
    changed = list(rows)
    for number in range(len(rows) * percent // 100):
        others = [name for name in SPECIALTIES if name != rows[number]["label"]]
        changed[number] = rows[number] | {"label": drawn.choice(others)}
    return changed


def held_out_questions() -> list[Row]:
    """The same held-out questions for every experiment, none of which is among those to learn from."""
    rows = []
    for name in SPECIALTIES:
        known = set(short_questions("Test")[name])
        texts = [text for text in short_questions("Validation")[name] if text not in known]
        rows += [{"text": text, "label": name} for text in texts[:HELD_OUT_QUESTIONS]]
    random.Random(0).shuffle(rows)
    return rows


def preference_pairs(directory: Path, seeds: Sequence[int]) -> None:
    """Pairs of a right and a wrong option: 60 in `train-<seed>.jsonl`, 40 in `held-out.jsonl`."""
    pairs = short_pairs()
    random.Random(0).shuffle(pairs)
    write_rows(directory / "held-out.jsonl", pairs[:40])
    for seed in seeds:
        write_rows(directory / f"train-{seed}.jsonl", random.Random(seed).sample(pairs[40:], 60))


def short_pairs() -> list[Row]:
    """Rows of `prompt`, `chosen` and `rejected` from the questions whose right option is known.

    The rejected option is drawn among the wrong ones. Questions of the kind "all of the above" are left out, because the
    answer tells nothing of the question.
    """
    from benchmarks.classification import FOLDER
    from launch.demo.embedded import fetch_demo_files

    drawn = random.Random(0)
    pairs = []
    for path in fetch_demo_files(f"{FOLDER}/MedMCQA-Validation"):
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            options = [option[3:].strip() for option in row["options"].split("\n")]
            right = row["answer"][3:].strip()
            wrong = [option for option in options if option != right]
            is_short = len(row["question"]) + 2 * max(map(len, options)) <= MAX_CHARACTERS
            names_others = any("above" in option.lower() or "none" in option.lower() for option in options)
            if right in options and wrong and is_short and not names_others:
                pairs.append({"prompt": row["question"], "chosen": right, "rejected": drawn.choice(wrong)})
    return pairs


def write_rows(path: Path, rows: list[Row]) -> None:
    """Rows as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")

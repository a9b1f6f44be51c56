"""Prompts of a review, read from a file of any format and sampled by a seed."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from strategies.errors import ConfigError, DataError
from trainer.data.document import Rejected, Row
from trainer.data.read.origin import Origin
from trainer.data.read.paths import expand, is_hub
from trainer.reporting.jsonl import json_text
from trainer.reporting.status import write_text_atomic

COLUMNS = ("messages", "prompt", "instruction", "question")
NO_ANSWER = "-"
"""Stands where a row of a task has its answer, which is not asked about."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """What models are told."""

    where: str
    """`file:line`."""
    text: str
    """As people read it."""
    turns: list[dict[str, Any]] | None
    """The conversation so far; None for a plain text."""


def draw_prompts(path: str, n: int, seed: int) -> list[Prompt]:
    """`n` prompts of a file in an order of the seed. Errors: ConfigError, DataError with file and line."""
    files = expand(path, "prompts")
    if hub := next((each for each in files if is_hub(each)), None):
        raise ConfigError(f"prompts={hub}: would be fetched from a hub; download its files and give their path")
    found: dict[str, Prompt] = {}
    for row in Origin("prompts", files).rows():
        parsed = row.parse()
        if isinstance(parsed, Rejected):
            raise DataError(str(parsed))
        prompt = _prompt(parsed)
        found.setdefault(prompt.text, prompt)  # the same one twice is asked once
    if not found:
        raise DataError(f"prompts={path}: holds no rows; fill it, or name another file")
    prompts = [*found.values()]
    return random.Random(f"prompts {seed}").sample(prompts, min(n, len(prompts)))


def write_rows(path: Path, prompts: list[Prompt]) -> None:
    """The rows of a task that asks them. Errors: StorageError."""
    plain = all(prompt.turns is None for prompt in prompts)
    rows = []
    for prompt in prompts:
        turns = prompt.turns or [{"role": "user", "content": prompt.text}]
        answered = {"messages": [*turns, {"role": "assistant", "content": NO_ANSWER}]}
        rows.append({"prompt": prompt.text, "completion": NO_ANSWER} if plain else answered)
    write_text_atomic(path, "".join(f"{json_text(row, ensure_ascii=False)}\n" for row in rows))


def _prompt(row: Row) -> Prompt:
    where, fields = f"{row.file}:{row.line}", row.fields
    column = next((name for name in COLUMNS if fields.get(name)), None)
    if column is None:
        raise DataError(
            f"{where}: has no prompt; it needs one of {', '.join(COLUMNS)}, and has {', '.join(sorted(fields))}"
        )
    value = fields[column]
    if column == "messages":
        return _conversation(where, value)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: {column} is {str(value)[:40]!r}; it must be a text")
    more = fields.get("input")
    if column == "instruction" and isinstance(more, str) and more.strip():
        value = f"{value}\n\n{more}"
    return Prompt(where, value, [{"role": "user", "content": value}] if column == "instruction" else None)


def _conversation(where: str, value: Any) -> Prompt:
    """The turns up to the last one of the user."""
    turns = value if isinstance(value, list) else []
    good = all(isinstance(turn, dict) and isinstance(turn.get("content"), str) and turn.get("role") for turn in turns)
    last = max((place for place, turn in enumerate(turns) if good and turn["role"] == "user"), default=None)
    if last is None:
        raise DataError(f"{where}: messages must be turns with a role and a text, one of the user's at least")
    kept = [{"role": turn["role"], "content": turn["content"]} for turn in turns[: last + 1]]
    said = [turn["content"] if len(kept) == 1 else f"{turn['role']}: {turn['content']}" for turn in kept]
    return Prompt(where, "\n\n".join(said), kept)

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
    """What models are asked."""

    location: str
    """`file:line`."""
    text: str
    """As people read it."""
    turns: list[dict[str, Any]] | None
    """The conversation so far; None for a plain text."""


def draw_prompts(path: str, n: int, seed: int) -> list[Prompt]:
    """`n` prompts of a file in an order of the seed. Errors: ConfigError, DataError with file and line."""
    files = expand(path, "prompts")
    hub = next((file for file in files if is_hub(file)), None)
    if hub is not None:
        raise ConfigError(f"prompts={hub}: would be fetched from a hub; download its files and give their path")
    prompt_by_text: dict[str, Prompt] = {}
    for row in Origin("prompts", files).rows():
        parsed = row.parse()
        if isinstance(parsed, Rejected):
            raise DataError(str(parsed))
        prompt = _prompt_of_row(parsed)
        prompt_by_text.setdefault(prompt.text, prompt)  # the same one twice is asked once
    if not prompt_by_text:
        raise DataError(f"prompts={path}: holds no rows; fill it, or name another file")
    prompts = [*prompt_by_text.values()]
    return random.Random(f"prompts {seed}").sample(prompts, min(n, len(prompts)))


def write_task_rows(path: Path, prompts: list[Prompt]) -> None:
    """The rows of a task that asks them. Errors: StorageError."""
    # A file has one form of rows: plain texts alone, or conversations throughout.
    plain = all(prompt.turns is None for prompt in prompts)
    rows = []
    for prompt in prompts:
        turns = prompt.turns or [{"role": "user", "content": prompt.text}]
        answered = {"messages": [*turns, {"role": "assistant", "content": NO_ANSWER}]}
        rows.append({"prompt": prompt.text, "completion": NO_ANSWER} if plain else answered)
    write_text_atomic(path, "".join(f"{json_text(row, ensure_ascii=False)}\n" for row in rows))


def _prompt_of_row(row: Row) -> Prompt:
    """The prompt of a row, from the first of `COLUMNS` that it has. Raises DataError if it has none."""
    where = f"{row.file}:{row.line}"
    fields = row.fields
    column = next((name for name in COLUMNS if fields.get(name)), None)
    if column is None:
        raise DataError(
            f"{where}: has no prompt; it needs one of {', '.join(COLUMNS)}, and has {', '.join(sorted(fields))}"
        )
    content = fields[column]
    if column == "messages":
        return _prompt_of_conversation(where, content)
    if not isinstance(content, str) or not content.strip():
        raise DataError(f"{where}: {column} is {str(content)[:40]!r}; it must be a text")
    if column != "instruction":
        return Prompt(where, content, None)
    context = fields.get("input")
    text = f"{content}\n\n{context}" if isinstance(context, str) and context.strip() else content
    return Prompt(where, text, [{"role": "user", "content": text}])


def _prompt_of_conversation(where: str, content: Any) -> Prompt:
    """The turns up to the last one of the user."""
    turns = content if isinstance(content, list) else []
    last_user = None
    if all(map(_is_turn, turns)):
        last_user = max((place for place, turn in enumerate(turns) if turn["role"] == "user"), default=None)
    if last_user is None:
        raise DataError(f"{where}: messages must be turns with a role and a text, one of the user's at least")
    asked = [{"role": turn["role"], "content": turn["content"]} for turn in turns[: last_user + 1]]
    if len(asked) == 1:
        return Prompt(where, asked[0]["content"], asked)
    return Prompt(where, "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in asked), asked)


def _is_turn(turn: Any) -> bool:
    return isinstance(turn, dict) and isinstance(turn.get("content"), str) and bool(turn.get("role"))

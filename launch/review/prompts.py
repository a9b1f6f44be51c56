"""Draws the prompts of a review from a file of any format that training data may have."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from strategies.errors import ConfigError, DataError
from trainer.data.document import RejectedRow, SourceRow
from trainer.data.read.origin import Origin
from trainer.data.read.paths import expand_paths, is_hub_path
from trainer.reporting.jsonl import json_text
from trainer.reporting.status import write_text_atomic

PROMPT_COLUMNS = ("messages", "prompt", "instruction", "question")
"""Columns that may hold the prompt, in the order in which they are tried."""
PLACEHOLDER_ANSWER = "-"
"""The expected answer in the rows of the evaluation task: reviewers judge, so there is none, but the format needs one."""


@dataclass(frozen=True, slots=True)
class ReviewPrompt:
    """One prompt that every model answers."""

    location: str
    """`file:line`."""
    text: str
    """What reviewers read."""
    turns: list[dict[str, Any]] | None
    """The conversation that the model continues, each turn with `role` and `content`; None for a plain text."""


def draw_prompts(path: str, num_prompts: int, seed: int) -> list[ReviewPrompt]:
    """Draw the prompts of a review: `num_prompts` different ones at random from the files at `path`; all if there are fewer.

    `path`: one file or several, in any format that training data may have. Raises ConfigError for a path that is no local
    file, DataError with file and line for a row without a prompt.
    """
    files = expand_paths(path, "prompts")
    for file in files:
        if is_hub_path(file):
            raise ConfigError(f"prompts={file}: would be fetched from a hub; download its files and give their path")
    prompt_by_text: dict[str, ReviewPrompt] = {}
    for row in Origin("prompts", files).rows():
        parsed = row.parse()
        if isinstance(parsed, RejectedRow):
            raise DataError(str(parsed))
        prompt = _prompt_of_row(parsed)
        prompt_by_text.setdefault(prompt.text, prompt)  # a repeated prompt is judged once
    if not prompt_by_text:
        raise DataError(f"prompts={path}: holds no rows; fill it, or name another file")
    prompts = list(prompt_by_text.values())
    return random.Random(f"prompts {seed}").sample(prompts, min(num_prompts, len(prompts)))


def write_task_rows(path: Path, prompts: list[ReviewPrompt]) -> None:
    """Write the prompts as the file of an evaluation task, by which the compared models answer them. Raises StorageError.

    A row needs an expected answer. Nobody scores here, so it is `PLACEHOLDER_ANSWER`.
    """
    # All rows of a file must have the same form. If any prompt is a conversation, plain texts become one-turn conversations.
    are_all_plain_texts = all(prompt.turns is None for prompt in prompts)
    lines = []
    for prompt in prompts:
        if are_all_plain_texts:
            row: dict[str, Any] = {"prompt": prompt.text, "completion": PLACEHOLDER_ANSWER}
        else:
            turns = prompt.turns or [{"role": "user", "content": prompt.text}]
            row = {"messages": [*turns, {"role": "assistant", "content": PLACEHOLDER_ANSWER}]}
        lines.append(f"{json_text(row, ensure_ascii=False)}\n")
    write_text_atomic(path, "".join(lines))


def _prompt_of_row(row: SourceRow) -> ReviewPrompt:
    """Find the prompt in a row of data: that of the first of `PROMPT_COLUMNS` that the row has. Raises DataError if it has none.

    `messages` is a conversation. A `prompt` or `question` is a plain text. An `instruction` is a user's turn, with the
    column `input` below it if there is one.
    """
    location = f"{row.file}:{row.line}"
    fields = row.fields
    column = next((name for name in PROMPT_COLUMNS if fields.get(name)), None)
    if column is None:
        raise DataError(
            f"{location}: has no prompt; it needs one of {', '.join(PROMPT_COLUMNS)}, and has {', '.join(sorted(fields))}"
        )
    content = fields[column]
    if column == "messages":
        return _prompt_of_conversation(location, content)
    if not isinstance(content, str) or not content.strip():
        raise DataError(f"{location}: {column} is {str(content)[:40]!r}; it must be a text")
    if column != "instruction":
        return ReviewPrompt(location, content, turns=None)
    # Data in the style of Alpaca: `input` holds the text that the instruction is about.
    context = fields.get("input")
    has_context = isinstance(context, str) and bool(context.strip())
    text = f"{content}\n\n{context}" if has_context else content
    return ReviewPrompt(location, text, [{"role": "user", "content": text}])


def _prompt_of_conversation(location: str, messages: Any) -> ReviewPrompt:
    """The prompt of a conversation: its turns up to the last one of the user, so that the model writes the next one.

    `location`: `file:line` for messages. Raises DataError if it is no conversation.
    """
    turns = messages if isinstance(messages, list) else []
    last_user_turn = None
    if all(map(_is_text_turn, turns)):
        for index, turn in enumerate(turns):
            if turn["role"] == "user":
                last_user_turn = index
    if last_user_turn is None:
        raise DataError(f"{location}: messages must be turns with a role and a text, one of the user's at least")
    prompt_turns = [{"role": turn["role"], "content": turn["content"]} for turn in turns[: last_user_turn + 1]]
    if len(prompt_turns) == 1:
        return ReviewPrompt(location, text=prompt_turns[0]["content"], turns=prompt_turns)
    text = "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt_turns)
    return ReviewPrompt(location, text=text, turns=prompt_turns)


def _is_text_turn(turn: Any) -> bool:
    """Whether `turn` is a turn of a conversation with a role and a text."""
    return isinstance(turn, dict) and isinstance(turn.get("content"), str) and bool(turn.get("role"))

"""Tokens that end an answer: those of the generation settings, and the one that closes the assistant's turn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

GENERATION = "generation_config.json"
_ANSWER = "an answer"


def ending_tokens(tokenizer: Any, generation: Any = None) -> list[int]:
    """Ids, in ascending order; `generation` is a GenerationConfig or None."""
    stated = getattr(generation, "eos_token_id", None)
    ends = set(stated) if isinstance(stated, list | tuple) else {stated}
    ends |= {tokenizer.eos_token_id, turn_end(tokenizer)}
    return sorted(end for end in ends if end is not None)


def turn_end(tokenizer: Any) -> int | None:
    """The control token that the chat template puts right after an answer; None where there is none."""
    if tokenizer.chat_template is None:
        return None
    talk = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": _ANSWER}]
    try:
        text = tokenizer.apply_chat_template(talk, tokenize=False)
    except Exception:  # noqa: BLE001 - a template may refuse anything, in its own words; then it tells no end
        return None
    _, found, rest = text.rpartition(_ANSWER)
    ids = tokenizer(rest.lstrip(), add_special_tokens=False)["input_ids"] if found else []
    control = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return ids[0] if ids and ids[0] in control else None


def write_endings(tokenizer: Any, directory: Path, base_path: str) -> None:
    """Have `generation_config.json` name the token that closes a turn, so that every engine stops there.

    Where the base's settings name it already, what lies in `directory` stays as it is.
    """
    if (end := turn_end(tokenizer)) is None:
        return
    file = directory / GENERATION
    source = file if file.is_file() else Path(base_path) / GENERATION
    settings = json.loads(source.read_text(encoding="utf-8")) if source.is_file() else {}
    stated = settings.get("eos_token_id", tokenizer.eos_token_id)
    ends = [*stated] if isinstance(stated, list) else [] if stated is None else [stated]
    if end not in ends:
        file.write_text(json.dumps({**settings, "eos_token_id": [*ends, end]}, indent=2) + "\n", encoding="utf-8")

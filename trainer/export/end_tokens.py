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
    """The control token that the chat template writes right after an answer; None if it writes none."""
    if tokenizer.chat_template is None:
        return None
    talk = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": _ANSWER}]
    try:
        text = tokenizer.apply_chat_template(talk, tokenize=False)
    except Exception:  # noqa: BLE001 - a template may refuse anything, in its own words; then it tells no end
        return None
    _, separator, after_answer = text.rpartition(_ANSWER)
    if not separator:
        return None
    ids = tokenizer(after_answer.lstrip(), add_special_tokens=False)["input_ids"]
    control_tokens = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return ids[0] if ids and ids[0] in control_tokens else None


def write_endings(tokenizer: Any, directory: Path, base_path: str) -> None:
    """Add the token that closes a turn to `generation_config.json`, so that every inference engine stops there.

    If the base's settings name it already, the file in `directory` stays as it is.
    """
    end = turn_end(tokenizer)
    if end is None:
        return
    file = directory / GENERATION
    source = file if file.is_file() else Path(base_path) / GENERATION
    settings = json.loads(source.read_text(encoding="utf-8")) if source.is_file() else {}
    stated = settings.get("eos_token_id", tokenizer.eos_token_id)
    ends = []
    if isinstance(stated, list):
        ends = [*stated]
    elif stated is not None:
        ends = [stated]
    if end not in ends:
        file.write_text(json.dumps({**settings, "eos_token_id": [*ends, end]}, indent=2) + "\n", encoding="utf-8")

"""Tokens that end an answer: those of the generation settings, and the one that closes the assistant's turn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

GENERATION = "generation_config.json"
_ANSWER = "an answer"


def end_token_ids(tokenizer: Any, generation: Any = None) -> list[int]:
    """Ids, in ascending order; `generation` is a GenerationConfig or None."""
    # The generation settings state one id or several.
    stated = getattr(generation, "eos_token_id", None)
    if not isinstance(stated, list | tuple):
        stated = [stated]
    end_ids = {*stated, tokenizer.eos_token_id, turn_end_token(tokenizer)}
    return sorted(end_id for end_id in end_ids if end_id is not None)


def turn_end_token(tokenizer: Any) -> int | None:
    """The id of the control token that the chat template writes right after an answer (such as `<|im_end|>`), or None."""
    if tokenizer.chat_template is None:
        return None
    messages = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": _ANSWER}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception:  # noqa: BLE001 - a template may refuse anything, in its own words; then it tells no end
        return None
    _, separator, after_answer = text.rpartition(_ANSWER)
    if not separator:
        return None
    ids = tokenizer(after_answer.lstrip(), add_special_tokens=False)["input_ids"]
    control_tokens = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    if ids and ids[0] in control_tokens:
        return ids[0]  # type: ignore[no-any-return]
    return None


def write_end_tokens(tokenizer: Any, directory: Path, base_path: str) -> None:
    """Add the token that closes a turn to `generation_config.json`, so that every inference engine stops there.

    If the base's settings name it already, the file in `directory` stays as it is.
    """
    end_id = turn_end_token(tokenizer)
    if end_id is None:
        return
    file = directory / GENERATION
    # An adapter's directory has no settings of its own yet.
    source = file
    if not file.is_file():
        source = Path(base_path) / GENERATION
    settings = {}
    if source.is_file():
        settings = json.loads(source.read_text(encoding="utf-8"))
    # One id, a list of ids, or None.
    stated = settings.get("eos_token_id", tokenizer.eos_token_id)
    stated_ids = []
    if isinstance(stated, list):
        stated_ids = stated
    elif stated is not None:
        stated_ids = [stated]
    if end_id not in stated_ids:
        settings["eos_token_id"] = [*stated_ids, end_id]
        file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

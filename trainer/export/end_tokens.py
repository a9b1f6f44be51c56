"""Tokens that end an answer: those of the generation settings, and the one that closes the assistant's turn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

GENERATION_FILE = "generation_config.json"
_PROBE_ANSWER = "an answer"


def end_token_ids(tokenizer: Any, generation_config: Any = None) -> list[int]:
    """The ids of the tokens that end an answer, in ascending order; empty if none is known.

    Those of `generation_config` (transformers' GenerationConfig or None), the tokenizer's own, and the one that closes a turn of
    the chat template.
    """
    # The generation settings state one id or several.
    stated_ids = getattr(generation_config, "eos_token_id", None)
    if not isinstance(stated_ids, list | tuple):
        stated_ids = [stated_ids]
    end_ids = {*stated_ids, tokenizer.eos_token_id, turn_end_token(tokenizer)}
    return sorted(end_id for end_id in end_ids if end_id is not None)


def turn_end_token(tokenizer: Any) -> int | None:
    """The id of the control token that the chat template writes right after an answer, such as that of `<|im_end|>`.

    None without a chat template, if the template refuses a short conversation or leaves its answer out, or if no control token
    follows the answer.
    """
    if tokenizer.chat_template is None:
        return None
    messages = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": _PROBE_ANSWER}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception:  # noqa: BLE001 - a template may refuse anything, by errors of its own
        return None
    _, found_answer, after_answer = text.rpartition(_PROBE_ANSWER)
    if not found_answer:
        return None
    ids = tokenizer(after_answer.lstrip(), add_special_tokens=False)["input_ids"]
    control_token_ids = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    if ids and ids[0] in control_token_ids:
        return ids[0]  # type: ignore[no-any-return]
    return None


def write_end_tokens(tokenizer: Any, directory: Path, base_path: str) -> None:
    """Add the token that closes a turn to `generation_config.json` in `directory`, so that every inference engine stops there.

    An adapter's directory has no such file yet: then it begins with the settings of the base. Nothing is written if the chat
    template closes turns with no token of its own, or if the settings name that token already.
    """
    end_id = turn_end_token(tokenizer)
    if end_id is None:
        return
    file = directory / GENERATION_FILE
    source = file if file.is_file() else Path(base_path) / GENERATION_FILE
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

"""Tokens that end an answer: those of the generation settings, and the one that closes the assistant's turn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

GENERATION_FILE = "generation_config.json"
_PROBE_ANSWER = "an answer"
"""Content of an answer that is rendered, to find what the chat template writes after it."""


def end_token_ids(tokenizer: Any, generation_config: Any = None) -> list[int]:
    """The ids of the tokens that end an answer of this model, in ascending order; empty if none is known.

    They are the end tokens of `generation_config` (transformers' GenerationConfig or None), that of the tokenizer, and the
    token that closes a turn of the chat template.
    """
    # The generation settings have one id, several, or None.
    configured_ids = getattr(generation_config, "eos_token_id", None)
    if not isinstance(configured_ids, list | tuple):
        configured_ids = [configured_ids]
    end_ids = {*configured_ids, tokenizer.eos_token_id, turn_end_token_id(tokenizer)}
    return sorted(end_id for end_id in end_ids if end_id is not None)


def turn_end_token_id(tokenizer: Any) -> int | None:
    """Find the control token that the chat template writes right after an answer, such as `<|im_end|>`: its id.

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
    """Add the token that closes a turn to `generation_config.json` in `directory`, so that inference engines stop there.

    An adapter's directory has no such file yet: then it begins with the settings of the base, if `base_path` is a directory
    and no hub id. Nothing is written if the chat template closes turns with no token of its own, or if the settings name that
    token already.
    """
    end_id = turn_end_token_id(tokenizer)
    if end_id is None:
        return
    output_file = directory / GENERATION_FILE
    source_file = output_file if output_file.is_file() else Path(base_path) / GENERATION_FILE
    settings = {}
    if source_file.is_file():
        settings = json.loads(source_file.read_text(encoding="utf-8"))
    # One id, a list of ids, or None.
    configured = settings.get("eos_token_id", tokenizer.eos_token_id)
    configured_ids = []
    if isinstance(configured, list):
        configured_ids = configured
    elif configured is not None:
        configured_ids = [configured]
    if end_id not in configured_ids:
        settings["eos_token_id"] = [*configured_ids, end_id]
        output_file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

"""The fields of an adapter_config.json that are computed with, and the type that each must have. Needs no torch."""

from __future__ import annotations

import json
from typing import Any

NUMBER_FIELDS = ("r", "lora_alpha", "alpha", "lora_dropout", "oft_block_size", "boft_block_size", "num_virtual_tokens")
TEXT_FIELDS = ("peft_type", "task_type", "bias", "base_model_name_or_path")
DICT_FIELDS = ("rank_pattern", "alpha_pattern")
NAME_LIST_FIELDS = ("target_modules", "modules_to_save", "target_parameters")
"""Fields that hold a list of names, or one regular expression."""


def wrong_type_message(settings: dict[str, Any]) -> str | None:
    """Which field of an adapter_config.json has a value of the wrong type: the first one; None if all types are right.

    `settings`: the file's JSON, which anybody may have written. Null is right for every field. `{"r": "8"}` gives
    `r="8", which is no number`.
    """
    for name, value in settings.items():
        if value is None:
            continue
        assignment = f"{name}={json.dumps(value)[:80]}"
        if name in NUMBER_FIELDS and (isinstance(value, bool) or not isinstance(value, int | float)):
            return f"{assignment}, which is no number"
        if name in TEXT_FIELDS and not isinstance(value, str):
            return f"{assignment}, which is no text"
        if name in DICT_FIELDS and not isinstance(value, dict):
            return f"{assignment}, which is no table of numbers by names"
        if name in NAME_LIST_FIELDS and not _are_names(value):
            return f"{assignment}, which is no list of names"
    return None


def _are_names(value: Any) -> bool:
    """Whether a field's value is a list of names, or one regular expression."""
    if isinstance(value, str):
        return True
    return isinstance(value, list) and all(isinstance(name, str) for name in value)

"""Suggests `data.columns` for columns that no format knows: names that other projects and well-known data sets use."""

from __future__ import annotations

from typing import Any

from trainer.data.fields import Refusal, value_at

_PROMPTS = ("prompt", "question", "query", "instruction", "problem", "input")
_COMPLETIONS = ("completion", "response", "answer", "output", "solution", "answers.text.0")
_CHOSEN = ("chosen", "chosen_messages")
_REJECTED = ("rejected", "rejected_messages")
_SYSTEM = ("system", "system_prompt")
_PASSAGES = ("context", "passage")


def suggested_columns(fields: dict[str, Any]) -> dict[str, str]:
    """A value for `data.columns` that seems to be meant: the row's column by the expected name. Empty if nothing is.

    - an answer that is chosen and one that is rejected: a pair, with its prompt if there is one;
    - a prompt, a passage and a completion: an instruction with its input;
    - a prompt and a completion: both, with a system prompt if there is one.
    """
    prompt = _first_with_value(fields, _PROMPTS)
    chosen = _first_with_value(fields, _CHOSEN)
    rejected = _first_with_value(fields, _REJECTED)
    if chosen and rejected:
        columns = {"chosen": chosen, "rejected": rejected}
        if prompt:
            columns["prompt"] = prompt
        return columns
    completion = _first_with_value(fields, _COMPLETIONS)
    if not prompt or not completion:
        return {}
    passage = _first_with_value(fields, _PASSAGES)
    if passage:
        return {"instruction": prompt, "input": passage, "output": completion}
    columns = {"prompt": prompt, "completion": completion}
    system = _first_with_value(fields, _SYSTEM)
    if system:
        columns["system"] = system
    return columns


def _first_with_value(fields: dict[str, Any], names: tuple[str, ...]) -> str | None:
    """The first of `names` that the row has a value for, as the row spells it."""
    by_lower_case = {name.lower(): name for name in fields}
    for name in names:
        column = by_lower_case.get(name, name)
        try:
            field_value = value_at(fields, column)
        except (KeyError, Refusal):
            continue
        if field_value is not None:
            return column
    return None

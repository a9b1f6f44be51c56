"""Which `data.columns` fit columns that no format knows: names that other projects and well-known data sets use."""

from __future__ import annotations

from typing import Any

from trainer.data.fields import Refusal, value_at

_PROMPTS = ("prompt", "question", "query", "instruction", "problem", "input")
_COMPLETIONS = ("completion", "response", "answer", "output", "solution", "answers.text.0")
_ROLES: dict[str, tuple[str, ...]] = {
    "system": ("system", "system_prompt"),
    "chosen": ("chosen", "chosen_messages"),
    "rejected": ("rejected", "rejected_messages"),
}


def suggested_columns(fields: dict[str, Any]) -> dict[str, str]:
    """Expected name by the name in the row, of columns that seem to be meant; empty if nothing is."""
    chosen, rejected = (_first_with_value(fields, _ROLES[role]) for role in ("chosen", "rejected"))
    if chosen and rejected:
        prompt = _first_with_value(fields, _PROMPTS)
        return {"chosen": chosen, "rejected": rejected, **({"prompt": prompt} if prompt else {})}
    question, answer = _first_with_value(fields, _PROMPTS), _first_with_value(fields, _COMPLETIONS)
    if not question or not answer:
        return {}
    if passage := _first_with_value(fields, ("context", "passage")):
        return {"instruction": question, "input": passage, "output": answer}
    system = _first_with_value(fields, _ROLES["system"])
    return {"prompt": question, "completion": answer, **({"system": system} if system else {})}


def _first_with_value(fields: dict[str, Any], names: tuple[str, ...]) -> str | None:
    """The first of `names` that the row has a value for, as the row spells it."""
    by_lower_case = {name.lower(): name for name in fields}
    for name in names:
        column = by_lower_case.get(name, name)
        try:
            value = value_at(fields, column)
        except (KeyError, Refusal):
            continue
        if value is not None:
            return column
    return None

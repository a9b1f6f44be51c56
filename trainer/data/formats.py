"""What a row means: the four formats, and a checked document out of each.

Refuses rows whose columns fit no format, wrong types, empty texts, unknown roles, conversations without an assistant
turn, text that no tokenizer can encode, and a change of format between rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from strategies.errors import DataError
from trainer.data.rows import Row
from trainer.data.settings import DataFormat

ROLES = {  # what rows may say -> what chat templates know
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
}
NEEDS = {
    DataFormat.messages: '"messages": a list of {"role": "system|user|assistant", "content": "text"}',
    DataFormat.prompt_completion: '"prompt" and "completion" (or "instruction", optional "input", and "output")',
    DataFormat.text: '"text": a text',
    DataFormat.labelled: '"text": a text, and "label": a name or a whole number',
}


@dataclass(slots=True)
class Document:
    """One training document. What is set depends on the format: `messages`, `prompt` + `completion`, or `text`."""

    file: Path
    line: int
    messages: list[dict[str, str]] | None = None
    prompt: str | None = None
    completion: str | None = None
    text: str | None = None
    label: str | None = None
    separator: str = ""
    """What stands between prompt and completion where no chat template does (rows with an instruction)."""

    @property
    def where(self) -> str:
        """`file:line`, as every message about a row begins."""
        return f"{self.file}:{self.line}"

    def texts(self) -> list[str]:
        """All texts that came from the row."""
        if self.messages is not None:
            return [message["content"] for message in self.messages]
        return [text for text in (self.prompt, self.completion, self.text) if text is not None]


def documents(rows: Iterable[Row], format: DataFormat, columns: dict[str, str]) -> Iterator[Document]:
    """Checked documents. With `auto` the first row decides the format; a later row of another one is an error."""
    first: Row | None = None
    for row in rows:
        if first is None:
            first = row
            format = recognise(row, columns) if format is DataFormat.auto else format
        elif not _fits(_renamed(row, columns), format):
            found = next((f for f in _ORDER if _fits(_renamed(row, columns), f)), None)
            raise _refusal(
                row,
                f"{found.value if found else 'no known'} format, but the rows since {first.file}:{first.line} are in "
                f"{format.value} format; all rows must have the same: {NEEDS[format]}",
            )
        yield to_document(row, format, columns)


def recognise(row: Row, columns: dict[str, str]) -> DataFormat:
    """The format whose columns the row has. Raises DataError that shows the columns found and needed."""
    fields = _renamed(row, columns)
    for format in _ORDER:
        if _fits(fields, format):
            return format
    needs = "\n".join(f"  {format.value}: {text}" for format, text in NEEDS.items())
    raise _refusal(
        row, f"columns {sorted(fields)} fit no format; rename them with data.columns or provide one of\n{needs}"
    )


_ORDER = (DataFormat.messages, DataFormat.prompt_completion, DataFormat.labelled, DataFormat.text)


def _fits(fields: dict[str, Any], format: DataFormat) -> bool:
    if format is DataFormat.messages:
        return "messages" in fields or "conversations" in fields
    if format is DataFormat.prompt_completion:
        return {"prompt", "completion"} <= fields.keys() or {"instruction", "output"} <= fields.keys()
    if format is DataFormat.labelled:
        return {"text", "label"} <= fields.keys()
    return "text" in fields


def _renamed(row: Row, columns: dict[str, str]) -> dict[str, Any]:
    if not columns:
        return row.fields
    for expected, name in columns.items():
        if name not in row.fields:
            raise _refusal(row, f"no column {name!r} (data.columns.{expected}); the row has {sorted(row.fields)}")
    taken = set(columns.values())
    kept = {name: value for name, value in row.fields.items() if name not in taken}
    return {**kept, **{expected: row.fields[name] for expected, name in columns.items()}}


def to_document(row: Row, format: DataFormat, columns: dict[str, str]) -> Document:
    """Check one row against `format`. Raises DataError with file and line."""
    fields = _renamed(row, columns)
    if not _fits(fields, format):
        raise _refusal(row, f"columns {sorted(fields)}, but data.format={format.value} needs {NEEDS[format]}")
    document = Document(row.file, row.line)
    if format is DataFormat.messages:
        document.messages = _messages(row, fields)
    elif format is DataFormat.prompt_completion and "completion" in fields:
        document.prompt, document.completion = (_text(row, fields, name) for name in ("prompt", "completion"))
    elif format is DataFormat.prompt_completion:
        extra = fields.get("input")
        extra = _text(row, fields, "input") if extra not in (None, "") else None
        instruction = _text(row, fields, "instruction")
        document.prompt = instruction if extra is None else f"{instruction}\n\n{extra}"
        document.completion, document.separator = _text(row, fields, "output"), "\n\n"
    else:
        document.text = _text(row, fields, "text")
        if format is DataFormat.labelled:
            document.label = _label(row, fields["label"])
    return document


def _messages(row: Row, fields: dict[str, Any]) -> list[dict[str, str]]:
    key = "messages" if "messages" in fields else "conversations"
    turns = fields[key]
    if not isinstance(turns, list) or not turns:
        raise _refusal(row, f'"{key}" is {_show(turns)}; {NEEDS[DataFormat.messages]}')
    messages = []
    for number, turn in enumerate(turns, 1):
        name = f"{key}[{number}]"
        if not isinstance(turn, dict):
            raise _refusal(row, f'{name} is {_show(turn)}; it must be {{"role": ..., "content": ...}}')
        role_key, text_key = ("from", "value") if "from" in turn and "role" not in turn else ("role", "content")
        role = turn.get(role_key)
        if not isinstance(role, str) or role not in ROLES:
            raise _refusal(row, f"{name}.{role_key} is {_show(role)}; known roles are {', '.join(ROLES)}")
        if turn.get("tool_calls"):
            raise _refusal(row, f"{name} has tool_calls, which are not supported; write the call into its content")
        messages.append({"role": ROLES[role], "content": _text(row, turn, text_key, f"{name}.{text_key}")})
    roles = [message["role"] for message in messages]
    if roles[0] == "assistant":
        raise _refusal(
            row, "the conversation begins with an assistant turn; it must begin with a system or a user turn"
        )
    if "assistant" not in roles:
        raise _refusal(
            row, f"the conversation has no assistant turn (roles: {', '.join(roles)}); there is nothing to learn"
        )
    return messages


def _text(row: Row, fields: dict[str, Any], key: str, name: str | None = None) -> str:
    value = fields.get(key)
    name = name or f'"{key}"'
    if not isinstance(value, str):
        raise _refusal(row, f"{name} is {_show(value) if key in fields else 'missing'}; it must be a text")
    if not value.strip():
        raise _refusal(row, f"{name} is an empty text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise _refusal(
            row, f"{name} holds half a surrogate pair (character {error.start + 1}), which is no character"
        ) from error
    return value


def _label(row: Row, value: Any) -> str:
    if isinstance(value, str) and value.strip():
        return value.strip()
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise _refusal(row, f'"label" is {_show(value)}; it must be a name or a whole number')


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _refusal(row: Row, message: str) -> DataError:
    return DataError(f"{row.file}:{row.line}: {message}")

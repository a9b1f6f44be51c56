"""What a row means: nine formats, how each is recognised by its columns, and a document out of every row that fits.

A row that cannot be one is `Rejected` with a reason and a message, never changed to fit. Columns that fit several
formats, and columns that fit none, are errors: a guess here would train on the wrong text.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from strategies.errors import ConfigError, DataError
from trainer.data.config import DataFormat
from trainer.data.document import Document, Message
from trainer.data.stages.checks import Refusal, conversation, label_of, parted, shown, text_of, turns_of, verdict_of

NEEDS = {
    DataFormat.messages: '"messages": a list of {"role": "system|user|assistant", "content": "text"}',
    DataFormat.sharegpt: '"conversations": a list of {"from": "system|human|gpt", "value": "text"}',
    DataFormat.alpaca: '"instruction", optional "input", and "output"',
    DataFormat.prompt_completion: '"prompt" and "completion" (or question/answer, query/response, input/output)',
    DataFormat.pair: '"source" and "target"',
    DataFormat.labelled: '"text": a text, and "label": a name, a whole number or true/false',
    DataFormat.text: '"text": a text',
    DataFormat.preference: '"prompt", "chosen" and "rejected" (or chosen and rejected conversations)',
    DataFormat.thumbs: '"prompt" and "completion", or "messages"; and "label": true/false, or "thumbs": up/down',
}
Spelling = tuple[str, ...]
_TABLE = {  # the columns that make a format, likeliest spelling first
    DataFormat.messages: "messages | conversation",
    DataFormat.sharegpt: "conversations",
    DataFormat.alpaca: "instruction output | instruction response",
    DataFormat.prompt_completion: "prompt completion | prompt response | question answer | query response | input output",
    DataFormat.pair: "source target | input target",
    DataFormat.labelled: "text label | sentence label | content label",
    DataFormat.text: "text | content",
    DataFormat.preference: "prompt chosen rejected | question chosen rejected | chosen rejected",
    DataFormat.thumbs: "prompt completion label | prompt completion thumbs | messages label | messages thumbs",
}
SPELLINGS: dict[DataFormat, list[Spelling]] = {
    format: [tuple(spelling.split()) for spelling in text.split("|")] for format, text in _TABLE.items()
}
_WITHOUT_SYSTEM = (DataFormat.auto, DataFormat.pair, DataFormat.labelled, DataFormat.text)
OPTIONAL: dict[DataFormat, Spelling] = {f: () if f in _WITHOUT_SYSTEM else ("system",) for f in DataFormat}
OPTIONAL[DataFormat.alpaca] += ("input", "context")
_CONVERSATIONS = ("messages", "conversation", "conversations")
_ALSO_READS = {  # a format that was named reads these spellings too
    DataFormat.messages: SPELLINGS[DataFormat.sharegpt],
    DataFormat.sharegpt: SPELLINGS[DataFormat.messages],
    DataFormat.prompt_completion: SPELLINGS[DataFormat.alpaca],
}
_EXTENDS = {  # the same columns and more of them: the fuller reading is meant
    DataFormat.labelled: {DataFormat.text},
    DataFormat.alpaca: {DataFormat.text, DataFormat.prompt_completion},  # the Alpaca set has its rendering as text
    DataFormat.thumbs: {DataFormat.messages, DataFormat.prompt_completion},
}


class Row(Protocol):
    """One object of a file: its fields, and the line on which it starts (from 1)."""

    file: Any
    line: int
    fields: dict[str, Any]


@dataclass(slots=True)
class Rejected:
    """A row that is no document. `reason` is a short code to count by; `message` tells value and constraint."""

    file: str
    line: int
    reason: str
    message: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.message}"


def recognise(
    row: Row, columns: dict[str, str], *, source: str = "data", meant: tuple[DataFormat, ...] = ()
) -> DataFormat:
    """The format whose columns the row has; a null counts as a column that is not there.

    Renamed columns decide: a format that does not use all of them is not considered. Where several fit, the first of those
    that are `meant` does. Raises DataError, with the row,
    where no format or more than one fits; ConfigError where `columns` names a column that no format has.
    """
    setting = f"data.sources.{source}.columns" if source != "data" else "data.columns"
    _check_columns(columns, [*SPELLINGS], setting)
    try:
        fields = _renamed(row.fields, columns, setting)
    except Refusal as refusal:
        raise DataError(f"{row.file}:{row.line}: {refusal.message}") from None
    found = _candidates({k: v for k, v in fields.items() if v is not None}, columns) or _candidates(fields, columns)
    if len(found) == 1:
        return next(iter(found))
    if (chosen := next((format for format in meant if format in found), None)) is not None:
        return chosen
    names = f"{row.file}:{row.line}: columns {_names(fields)} fit"
    if found:
        readings = "\n".join(f"  {format.value}: {', '.join(spelling)}" for format, spelling in found.items())
        choice = f"{setting.removesuffix('columns')}format={'|'.join(found)}"
        raise DataError(f"{names} several formats; choose with {choice}\n{readings}\nthe row: {shown(fields)}")
    needs = "\n".join(f"  {format.value}: {text}" for format, text in NEEDS.items()) + f"\nthe row: {shown(fields)}"
    raise DataError(f"{names} no format; {_closest(fields, setting)}, or provide one of\n{needs}")


def _candidates(fields: dict[str, Any], columns: dict[str, str]) -> dict[DataFormat, Spelling]:
    """Formats that fit, with the spelling that does; those left out that another one extends."""
    found: dict[DataFormat, Spelling] = {}
    for format, spellings in SPELLINGS.items():
        for spelling in spellings:
            if columns.keys() <= {*spelling, *OPTIONAL[format]} and all(name in fields for name in spelling):
                found.setdefault(format, spelling)
    sure = True
    if found.get(DataFormat.thumbs, ("",))[-1] == "label" and "label" not in columns:
        value = fields["label"]
        sure = str(value) not in ("0", "1")  # which may be classes of another kind
        if verdict_of(value) is None:
            del found[DataFormat.thumbs]
    extended = {f for large in found if sure or large is not DataFormat.thumbs for f in _EXTENDS.get(large, ())}
    found = {format: spelling for format, spelling in found.items() if format not in extended}
    if len(found) > 1 and "content" not in columns and "content" in found.get(DataFormat.text, ()):
        del found[DataFormat.text]  # too vague a name to stand against a format
    return found


def _check_columns(columns: dict[str, str], formats: list[DataFormat], setting: str) -> None:
    spellings = [s for f in formats for s in (*SPELLINGS[f], *_ALSO_READS.get(f, ()), OPTIONAL[f])]
    known = list(dict.fromkeys(name for spelling in spellings for name in spelling))
    for name in columns:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}"
            reader = f"format={formats[0].value}" if len(formats) == 1 else "any format"
            raise ConfigError(f"{setting}.{name}: no column that {reader} reads; {hint}")


def _names(fields: dict[str, Any]) -> list[str]:
    """Columns in order of their names; those of objects one level down, with dots."""
    nested = ([f"{k}.{inner}" for inner in v] if isinstance(v, dict) and v else [k] for k, v in fields.items())
    return sorted(name for names in nested for name in names)


def _closest(fields: dict[str, Any], setting: str) -> str:
    """How to rename: the format that lacks least, and the columns whose names are near, or which alone are left."""
    lists = [name for name, value in fields.items() if isinstance(value, list)]
    texts = [name for name in _names(fields) if name not in lists]
    best, hint = 1.0, f"rename them with {setting}"
    if len(texts) > 1:
        hint += f", as in {setting}='{{prompt:{texts[0]},completion:{texts[1]}}}'"
    for format, spelling in ((format, spelling) for format, spellings in SPELLINGS.items() for spelling in spellings):
        pool = lists if spelling[0] in _CONVERSATIONS else texts
        free = [name for name in pool if name not in spelling]
        missing = [name for name in spelling if name not in fields]
        far, pairs = 0.0 if len(missing) < len(spelling) else 0.1, []
        for name in missing:
            near = difflib.get_close_matches(name, free, n=1)
            far += 1 - difflib.SequenceMatcher(None, name, near[0]).ratio() if near else 1
            pairs += [f"{name}:{column}" for column in near or free[:1]]
            free = [other for other in free if other not in (near or free[:1])]
        far = 0.99 if pairs and len(pool) == len(spelling) == 1 else far / len(spelling)
        if far < best:
            best, hint = far, f"closest is {format.value}, which lacks {', '.join(missing)}"
            hint += f"; if it is there, {setting}='{{{','.join(pairs)}}}'" if pairs else ""
    return hint


def _renamed(fields: dict[str, Any], columns: dict[str, str], setting: str) -> dict[str, Any]:
    if not columns:
        return fields
    found = {}
    for expected, name in columns.items():
        value: Any = fields
        for part in [name] if name in fields else name.split("."):  # a.b is a column of that name, or b inside a
            if isinstance(value, list) and part.isdecimal() and part.isascii() and int(part) < len(value):
                value = value[int(part)]
            elif isinstance(value, dict) and part in value:
                value = value[part]
            else:
                message = f"no column {name!r} ({setting}.{expected}); the row has {_names(fields)}"
                raise Refusal("missing_column", message)
        found[expected] = value
    taken = set(columns.values())
    return {**{name: value for name, value in fields.items() if name not in taken}, **found}


class RowReader:
    """Reads the rows of one source in one format. Raises ConfigError where `columns` cannot belong to it."""

    def __init__(
        self, format: DataFormat, columns: dict[str, str], *, source: str, label: Callable[[Any], str] = label_of
    ) -> None:
        if format is DataFormat.auto:
            raise ValueError("a reader needs a format; recognise() finds it from the first row")
        self.format, self.columns, self.source = format, dict(columns), source
        self.label_of = label
        self._setting = f"data.sources.{source}.columns" if source != "data" else "data.columns"
        _check_columns(columns, [format], self._setting)
        own, *others = SPELLINGS[format]
        # Instructions come before input and output, which they have too.
        spellings = [own, *_ALSO_READS.get(format, ()), *others]
        self._spellings = [s for s in spellings if columns.keys() <= {*s, "system", "input", "context"}] or spellings

    def __call__(self, row: Row) -> Document | Rejected:
        """The document of a row, or why there is none. Never raises for what a row holds."""
        try:
            fields = _renamed(row.fields, self.columns, self._setting)
            document = Document(str(row.file), row.line, self.source)
            self._read(document, fields, self._spelling(fields))
            if fields.get("system") not in (None, "") and self.format not in _WITHOUT_SYSTEM:
                _add_system(document, text_of(fields, "system"))
        except Refusal as refusal:
            return Rejected(str(row.file), row.line, refusal.reason, refusal.message)
        return document

    def _spelling(self, fields: dict[str, Any]) -> Spelling:
        filled = {name for name, value in fields.items() if value is not None}
        for names in (filled, fields.keys()):
            for spelling in self._spellings:
                if names >= {*spelling}:
                    return spelling
        needs = f"{self._setting.removesuffix('columns')}format={self.format.value} needs {NEEDS[self.format]}"
        raise Refusal("wrong_format", f"columns {_names(fields)}, but {needs}")

    def _read(self, document: Document, fields: dict[str, Any], spelling: Spelling) -> None:
        if spelling[-1] in ("thumbs", "label") and self.format is DataFormat.thumbs:
            value = fields[spelling[-1]]
            document.desirable = verdict_of(value)
            if document.desirable is None:
                allowed = "true or false, up or down, 1 or 0"
                raise Refusal("bad_label", f'"{spelling[-1]}" is {shown(value)}; it must be {allowed}')
            spelling = spelling[:-1]
        if self.format is DataFormat.preference:
            _read_preference(document, fields, spelling)
        elif len(spelling) == 1 and self.format is not DataFormat.text:
            document.messages = conversation(turns_of(fields[spelling[0]], spelling[0], NEEDS[DataFormat.messages]))
        elif self.format in (DataFormat.text, DataFormat.labelled):
            document.text = text_of(fields, spelling[0])
            document.label = self.label_of(fields["label"]) if self.format is DataFormat.labelled else None
        else:
            _read_prompt(document, fields, spelling)


def _read_prompt(document: Document, fields: dict[str, Any], spelling: Spelling) -> None:
    prompt, completion = spelling
    if isinstance(fields[prompt], list) or isinstance(fields[completion], list):
        before, after = _side(fields, prompt, "user"), _side(fields, completion, "assistant")
        for turn in before:  # earlier answers are context: what is learned is the completion
            if turn["role"] == "assistant":
                turn.setdefault("train", False)
        if all(turn["role"] != "assistant" for turn in after):
            raise Refusal("no_assistant_turn", f'"{completion}" has no assistant turn; there is nothing to learn')
        document.messages = conversation([*before, *after])
        return
    document.prompt, document.completion = text_of(fields, prompt), text_of(fields, completion)
    # By custom "prompt" and "completion" hold the separator between them; columns of other names do not.
    document.separator = "" if spelling == ("prompt", "completion") else "\n\n"
    if prompt == "instruction":
        for extra in ("input", "context"):
            if fields.get(extra) not in (None, ""):
                document.prompt += "\n\n" + text_of(fields, extra)


def _side(fields: dict[str, Any], name: str, role: str) -> list[Message]:
    """Turns of a column that holds a text or a list of messages."""
    if isinstance(fields[name], list):
        return turns_of(fields[name], name, NEEDS[DataFormat.messages])
    return [{"role": role, "content": text_of(fields, name)}]


def _read_preference(document: Document, fields: dict[str, Any], spelling: Spelling) -> None:
    alone = len(spelling) == 2
    before = [] if alone else _side(fields, spelling[0], "user")
    sides = []
    for name in ("chosen", "rejected"):
        transcript = alone and isinstance(fields[name], str)
        sides.append(turns_of(fields[name], name, "") if transcript else _side(fields, name, "assistant"))
    document.messages, document.chosen, document.rejected = parted(before, *sides)


def _add_system(document: Document, system: str) -> None:
    """Put the text of a "system" column before the conversation; a prompt and its completion become one."""
    if document.prompt is not None:
        answer = {"role": "assistant", "content": document.completion}
        document.messages = [{"role": "user", "content": document.prompt}, answer]
        document.prompt, document.completion, document.separator = None, None, ""
    messages = document.messages or []
    if messages and messages[0]["role"] == "system":
        if messages[0]["content"] != system:
            raise Refusal("two_system_turns", 'the "system" column differs from the system turn of the conversation')
        return
    document.messages = [{"role": "system", "content": system}, *messages]

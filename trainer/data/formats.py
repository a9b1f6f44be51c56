"""What a row means: nine formats, how each is recognised by its columns, and a document out of every row that fits.

A row that cannot be one is `Rejected` with a reason and a message, never changed to fit. Columns that fit several
formats, and columns that fit none, are errors: a guess here would train on the wrong text.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Collection
from typing import Any

from strategies.errors import ConfigError, DataError
from trainer.data.config import DataFormat
from trainer.data.document import Document, Message, Rejected, Row
from trainer.data.fields import (
    CARRIERS,
    VERDICTS,
    Fault,
    Refusal,
    Unread,
    group_of,
    is_nothing,
    is_surely_verdict,
    is_texts,
    label_of,
    show_value,
    text_of,
    value_at,
    verdict_of,
)
from trainer.data.messages import history_of, require_learnable, split_pair, tells_tools, tools_of, turns_of
from trainer.data.suggested import suggested_columns

NEEDS = {
    DataFormat.messages: '"messages": a list of {"role": "system|user|assistant", "content": "text"}',
    DataFormat.sharegpt: '"conversations": a list of {"from": "system|human|gpt", "value": "text"}',
    DataFormat.alpaca: '"instruction", optional "input", and "output"',
    DataFormat.prompt_completion: '"prompt" and "completion" (or question/answer, query/response, input/output)',
    DataFormat.pair: '"source" and "target"',
    DataFormat.labelled: '"text": a text, and "label": a name, a whole number or true/false',
    DataFormat.text: '"text": a text',
    DataFormat.preference: '"prompt" (or "conversations"), "chosen" and "rejected"; or the two as whole conversations',
    DataFormat.thumbs: '"prompt" and "completion", or "messages"; and "label": true/false, or "thumbs": up/down',
}
Spelling = tuple[str, ...]
_SPELLINGS_AS_TEXT = {  # the columns that make a format, likeliest spelling first
    DataFormat.messages: "messages | conversation",
    DataFormat.sharegpt: "conversations",
    DataFormat.alpaca: "instruction output | instruction response",
    DataFormat.prompt_completion: "prompt completion | prompt response | question answer | query response | input output",
    DataFormat.pair: "source target | input target",
    DataFormat.labelled: "text label | sentence label | content label",
    DataFormat.text: "text | content",
    DataFormat.preference: "prompt chosen rejected | question chosen rejected | conversations chosen rejected | chosen rejected",
    DataFormat.thumbs: "prompt completion label | prompt completion thumbs | messages label | messages thumbs",
}
SPELLINGS: dict[DataFormat, list[Spelling]] = {
    format: [tuple(spelling.split()) for spelling in text.split("|")] for format, text in _SPELLINGS_AS_TEXT.items()
}
_CONVERSATION_COLUMNS = ("system", "tools")
_WITHOUT_SYSTEM = (DataFormat.auto, DataFormat.pair, DataFormat.labelled, DataFormat.text)
_INSTRUCTION_COLUMNS = ("input", "context", "history")
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


def recognise(
    row: Row,
    columns: dict[str, str],
    *,
    source: str = "data",
    ignored: Collection[str] = (),
    preferred: tuple[DataFormat, ...] = (),
) -> DataFormat:
    """The format whose columns the row has; a null, or an `ignored` column, counts as one that is not there.

    Renamed columns decide: a format that does not use all of them is not considered. Where several fit, the first of those
    that are `preferred` does, and where none of these fits but for a null, which the first row may hold, that one. Raises
    DataError, with the row, where no format or more than one fits; ConfigError where `columns` names a column of no format.
    """
    setting = f"data.sources.{source}.columns" if source != "data" else "data.columns"
    _check_columns(columns, [*SPELLINGS], setting)
    try:
        fields = _rename_columns({k: v for k, v in row.fields.items() if k not in ignored}, columns, setting)
    except Refusal as refusal:
        raise DataError(f"{row.file}:{row.line}: {refusal.message}") from None
    verdicts = DataFormat.thumbs in preferred
    found = _fitting_formats({k: v for k, v in fields.items() if v is not None}, columns, verdicts=verdicts)
    named = _fitting_formats(fields, columns, verdicts=verdicts)
    if preferred and not {*preferred} & {*found} and {*preferred} & {*named}:
        found = named
    if len(found := found or named) == 1:
        return next(iter(found))
    if (chosen := next((format for format in preferred if format in found), None)) is not None:
        return chosen
    names = f"{row.file}:{row.line}: columns {_column_names(fields)} fit"
    if found:
        readings = "\n".join(f"  {format.value}: {', '.join(spelling)}" for format, spelling in found.items())
        choice = (
            f"{setting.removesuffix('columns')}format={'|'.join(found)}, or leave columns out with data.ignore_columns"
        )
        raise DataError(f"{names} several formats; choose with {choice}\n{readings}\nthe row: {show_value(fields)}")
    needs = (
        "\n".join(f"  {format.value}: {text}" for format, text in NEEDS.items()) + f"\nthe row: {show_value(fields)}"
    )
    wanted = SPELLINGS[preferred[0] if preferred else DataFormat.prompt_completion][0]
    suggested = suggested_columns(fields) if not columns else {}
    mapping = suggested or dict.fromkeys(wanted, "NAME")
    example = f"{setting}='{{{','.join(f'{expected}:{name}' for expected, name in mapping.items())}}}'"
    way_out = f"no format; rename them with {setting}, as in {example},"
    if suggested:
        way_out = f"no format; try {example}, or rename them"
    raise DataError(f"{names} {way_out} to one of\n{needs}{_about_columns(row)}")


def _about_columns(row: Row) -> str:
    """What else the columns of a row that fits no format may be."""
    if "segments" in row.fields:
        return (
            '\nsegments (axolotl\'s input_output): write them as messages, each with "train": true or false, as '
            "a format of spans of one text is not read"
        )
    if row.file.lower().endswith((".csv", ".tsv")):
        return "\nif these names are values, the file lacks a header line: put one on top"
    return ""


def _fitting_formats(fields: dict[str, Any], columns: dict[str, str], *, verdicts: bool) -> dict[DataFormat, Spelling]:
    """Formats that fit, with the spelling that does; those left out that another one extends.

    `verdicts`: the objective learns from verdicts, so that a column `label` holds one, whatever its value.
    """
    found: dict[DataFormat, Spelling] = {}
    for format, spellings in SPELLINGS.items():
        for spelling in spellings:
            if columns.keys() <= {*_read_with(spelling, format)} and all(name in fields for name in spelling):
                found.setdefault(format, spelling)
    sure = True
    if found.get(DataFormat.thumbs, ("",))[-1] == "label" and "label" not in columns:
        value = fields["label"]
        sure = str(value) not in ("0", "1")  # which may be classes of another kind
        if value is not None and not verdicts and not is_surely_verdict(value):
            del found[DataFormat.thumbs]
    if "conversations" in found.get(DataFormat.preference, ()):  # which are the prompt then
        found.pop(DataFormat.sharegpt, None)
    extended = {f for large in found if sure or large is not DataFormat.thumbs for f in _EXTENDS.get(large, ())}
    found = {format: spelling for format, spelling in found.items() if format not in extended}
    if len(found) > 1 and "content" not in columns and "content" in found.get(DataFormat.text, ()):
        del found[DataFormat.text]  # too vague a name to stand against a format
    return found


def _check_columns(columns: dict[str, str], formats: list[DataFormat], setting: str) -> None:
    spellings = [(s, f) for f in formats for s in (*SPELLINGS[f], *_ALSO_READS.get(f, ()))]
    known = list(dict.fromkeys(name for spelling, format in spellings for name in _read_with(spelling, format)))
    for name in columns:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}"
            reader = f"format={formats[0].value}" if len(formats) == 1 else "any format"
            raise ConfigError(f"{setting}.{name}: no column that {reader} reads; {hint}")


def _column_names(fields: dict[str, Any]) -> list[str]:
    """Columns in order of their names; those of objects one level down, with dots."""
    nested = ([f"{k}.{inner}" for inner in v] if isinstance(v, dict) and v else [k] for k, v in fields.items())
    return sorted(name for names in nested for name in names)


def _rename_columns(fields: dict[str, Any], columns: dict[str, str], setting: str) -> dict[str, Any]:
    if not columns:
        return fields
    found = {}
    for expected, name in columns.items():
        try:
            value = value_at(fields, name)
        except KeyError:
            message = f"no column {name!r} ({setting}.{expected}); the row has {_column_names(fields)}"
            raise Refusal("missing_column", message) from None
        found[expected] = value
    taken = set(columns.values())
    return {**{name: value for name, value in fields.items() if name not in taken}, **found}


class RowReader:
    """Reads the rows of one source in one format. Raises ConfigError where `columns` cannot belong to it.

    `ignored` columns (`data.ignore_columns`) count as not there. What else is not read is told by `unread`, and with
    `refuses` a row with a column that carries meaning is rejected. `label` reads a label; `group` names the column that every
    row must have a group in.
    """

    def __init__(
        self,
        format: DataFormat,
        columns: dict[str, str],
        *,
        source: str,
        label: Callable[[Any], str] = label_of,
        ignored: Collection[str] = (),
        refuses: bool = True,
        group: str | None = None,
    ) -> None:
        self.format, self.columns, self.source, self.ignored = format, dict(columns), source, frozenset(ignored)
        self.label_of, self.group = label, group
        self._setting = f"data.sources.{source}.columns" if source != "data" else "data.columns"
        _check_columns(columns, [format], self._setting)
        own, *others = SPELLINGS[format]
        # Instructions come before input and output, which they have too.
        spellings = [own, *_ALSO_READS.get(format, ()), *others]
        known = {*_CONVERSATION_COLUMNS, *_INSTRUCTION_COLUMNS}
        self._spellings = [s for s in spellings if columns.keys() <= {*s, *known}] or spellings
        asked = [*columns.values(), *([group] if group else ())]
        named = {*asked, *(name.split(".")[0] for name in asked)}
        self._reads = {spelling: (*_read_with(spelling, format), *named) for spelling in self._spellings}
        self.unread = Unread(CARRIERS[format] if refuses else (), self.ignored, self._setting)
        self.needed_columns = frozenset(
            {*CARRIERS[format], *(name for reads in self._reads.values() for name in reads)}
        )
        """Columns that decide over a document: of a table no others need be read."""

    def __call__(self, row: Row) -> Document | Rejected:
        """The document of a row, or why there is none. Never raises for what a row holds."""
        fields = row.fields
        try:
            if self.ignored:
                fields = {name: value for name, value in fields.items() if name not in self.ignored}
            document = Document(row.file, row.line, self.source)
            document.group = group_of(fields, self.group) if self.group else None
            fields = _rename_columns(fields, self.columns, self._setting)
            spelling = self._spelling(fields, row.unread_columns)
            for name in (reads := self._reads[spelling]):
                if isinstance(value := fields.get(name), Fault):
                    raise Refusal(value.reason, f'column "{name}": {value.message}')
            self._read(document, fields, spelling)
            if fields.get("system") not in (None, "") and self.format not in _WITHOUT_SYSTEM:
                _add_system(document, text_of(fields, "system"))
            if self.format not in _WITHOUT_SYSTEM and (tools := tools_of(fields.get("tools"))):
                document.messages = document.messages or document.take_turns()
                document.tools = None if tells_tools(document.messages[0]["content"], tools) else tools
            self.unread.note(fields, row.unread_columns, (*reads, *row.made_columns) if row.made_columns else reads)
        except Refusal as refusal:
            excerpt = json.dumps(row.fields, ensure_ascii=False, default=str)
            return Rejected(row.file, row.line, refusal.reason, refusal.message, excerpt)
        return document

    def _spelling(self, fields: dict[str, Any], others: tuple[str, ...]) -> Spelling:
        filled = {name for name, value in fields.items() if value is not None}
        for names in (filled, fields.keys()):
            for spelling in self._spellings:
                if names >= {*spelling}:
                    return spelling
        needs = f"{self._setting.removesuffix('columns')}format={self.format.value} needs {NEEDS[self.format]}"
        raise Refusal("wrong_format", f"columns {sorted([*_column_names(fields), *others])}, but {needs}")

    def _read(self, document: Document, fields: dict[str, Any], spelling: Spelling) -> None:
        if spelling[-1] in ("thumbs", "label") and self.format is DataFormat.thumbs:
            value = fields[spelling[-1]]
            document.desirable = verdict_of(value)
            if document.desirable is None:
                raise Refusal("bad_label", f'"{spelling[-1]}" is {show_value(value)}; it must be {VERDICTS}')
            spelling = spelling[:-1]
        if self.format is DataFormat.preference:
            _read_preference(document, fields, spelling, self.ignored)
        elif len(spelling) == 1 and self.format is not DataFormat.text:
            turns = turns_of(fields[spelling[0]], spelling[0], NEEDS[DataFormat.messages], self.ignored)
            document.messages = require_learnable(turns)
        elif self.format in (DataFormat.text, DataFormat.labelled):
            document.text = text_of(fields, spelling[0])
            document.label = self.label_of(fields["label"]) if self.format is DataFormat.labelled else None
        else:
            _read_prompt(document, fields, spelling, self.ignored)


def _read_with(spelling: Spelling, format: DataFormat) -> Spelling:
    """The columns that a spelling reads, those that may be missing included."""
    beside = () if format in _WITHOUT_SYSTEM else _CONVERSATION_COLUMNS
    return (*spelling, *beside, *(_INSTRUCTION_COLUMNS if spelling[0] == "instruction" else ()))


def _read_prompt(document: Document, fields: dict[str, Any], spelling: Spelling, ignored: Collection[str]) -> None:
    prompt, completion = spelling
    if _is_turns(fields[prompt]) or _is_turns(fields[completion]):
        before, after = _side(fields, prompt, "user", ignored), _side(fields, completion, "assistant", ignored)
        for turn in before:  # earlier answers are context: what is learned is the completion
            if turn["role"] == "assistant":
                turn.setdefault("train", False)
        if all(turn["role"] != "assistant" for turn in after):
            raise Refusal("no_assistant_turn", f'"{completion}" has no assistant turn; there is nothing to learn')
        document.messages = require_learnable([*before, *after])
        return
    document.prompt, document.completion = text_of(fields, prompt), text_of(fields, completion)
    # By custom "prompt" and "completion" hold the separator between them; columns of other names do not.
    document.separator = "" if spelling == ("prompt", "completion") else "\n\n"
    if prompt == "instruction":
        for extra in ("input", "context"):
            if fields.get(extra) not in (None, ""):
                document.prompt += "\n\n" + text_of(fields, extra)
        if not is_nothing(fields.get("history")):
            earlier = history_of(fields["history"])
            document.messages = [*earlier, *document.take_turns()]


def _is_turns(value: Any) -> bool:
    return isinstance(value, list | dict) and not is_texts(value)


def _side(fields: dict[str, Any], name: str, role: str, ignored: Collection[str]) -> list[Message]:
    """Turns of a column that holds a text, one message, or a list of messages."""
    value = fields[name]
    if _is_turns(value):
        turns = [value] if isinstance(value, dict) else value
        return turns_of(turns, name, NEEDS[DataFormat.messages], ignored)
    return [{"role": role, "content": text_of(fields, name)}]


def _read_preference(document: Document, fields: dict[str, Any], spelling: Spelling, ignored: Collection[str]) -> None:
    alone = len(spelling) == 2
    before = [] if alone else _side(fields, spelling[0], "user", ignored)
    sides = []
    for name in ("chosen", "rejected"):
        transcript = alone and isinstance(fields[name], str)
        sides.append(turns_of(fields[name], name, "") if transcript else _side(fields, name, "assistant", ignored))
    document.messages, document.chosen, document.rejected = split_pair(before, *sides)


def _add_system(document: Document, system: str) -> None:
    """Put the text of a "system" column before the conversation; a prompt and its completion become one."""
    if document.prompt is not None:
        document.messages = document.take_turns()
    messages = document.messages or []
    if messages and messages[0]["role"] == "system":
        if messages[0]["content"] != system:
            raise Refusal("two_system_turns", 'the "system" column differs from the system turn of the conversation')
        return
    document.messages = [{"role": "system", "content": system}, *messages]

"""Recognises which of ten formats a row has, by its columns, and makes a document of every row that fits.

A row that cannot be a document is `Rejected` with a reason and a message, never changed to fit. Columns that fit several
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
    MEANINGFUL_COLUMNS,
    VERDICT_SPELLINGS,
    Fault,
    KeptColumns,
    Refusal,
    UnreadColumns,
    is_blank_value,
    is_list_of_texts,
    is_surely_verdict,
    parse_group,
    parse_label,
    parse_text,
    parse_verdict,
    show_value,
    value_at,
)
from trainer.data.messages import (
    lists_all_tools,
    parse_history,
    parse_tools,
    parse_turns,
    require_learnable,
    split_pair,
)
from trainer.data.suggested import suggested_columns

FORMAT_NEEDS = {
    DataFormat.messages: '"messages": a list of {"role": "system|user|assistant", "content": "text"}',
    DataFormat.sharegpt: '"conversations": a list of {"from": "system|human|gpt", "value": "text"}',
    DataFormat.alpaca: '"instruction", optional "input", and "output"',
    DataFormat.prompt_completion: '"prompt" and "completion" (or question/answer, query/response, input/output)',
    DataFormat.pair: '"source" and "target"',
    DataFormat.labelled: '"text": a text, and "label": a name, a whole number or true/false',
    DataFormat.text: '"text": a text',
    DataFormat.preference: '"prompt" (or "conversations"), "chosen" and "rejected"; or the two as whole conversations',
    DataFormat.thumbs: '"prompt" and "completion", or "messages"; and "label": true/false, or "thumbs": up/down',
    DataFormat.prompt: '"prompt" (or question, problem, query, instruction, messages): a text or a list of messages',
}
Spelling = tuple[str, ...]
"""Columns that make a format, such as ("prompt", "completion") and ("question", "answer")."""
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
    DataFormat.prompt: "prompt | question | problem | query | instruction | messages | conversation | conversations",
}
FORMAT_SPELLINGS: dict[DataFormat, list[Spelling]] = {}
"""For each format the sets of columns that make it, likeliest first."""
for _format, _text in _SPELLINGS_AS_TEXT.items():
    FORMAT_SPELLINGS[_format] = [tuple(spelling.split()) for spelling in _text.split("|")]
_CONVERSATION_COLUMNS = ("system", "tools")
_WITHOUT_SYSTEM = (DataFormat.auto, DataFormat.pair, DataFormat.labelled, DataFormat.text)
_INSTRUCTION_COLUMNS = ("input", "context", "history")
_ALSO_READS = {  # a format that was named reads these spellings too
    DataFormat.messages: FORMAT_SPELLINGS[DataFormat.sharegpt],
    DataFormat.sharegpt: FORMAT_SPELLINGS[DataFormat.messages],
    DataFormat.prompt_completion: FORMAT_SPELLINGS[DataFormat.alpaca],
}
_EXTENDS = {  # the same columns and more of them: the fuller reading is meant
    DataFormat.labelled: {DataFormat.text},
    DataFormat.alpaca: {DataFormat.text, DataFormat.prompt_completion},  # the Alpaca set has its rendering as text
    DataFormat.thumbs: {DataFormat.messages, DataFormat.prompt_completion},
}


def recognise_format(
    row: Row,
    columns: dict[str, str],
    *,
    source: str = "data",
    ignored: Collection[str] = (),
    preferred: tuple[DataFormat, ...] = (),
) -> DataFormat:
    """The format whose columns the row has. A null, or an `ignored` column, counts as one that is not there.

    `columns`: `data.columns` of the `source`, the row's name of a column by the expected name. Renamed columns decide: a format
    that does not use all of them is not considered. If several formats fit, the first of the `preferred` ones is taken. If none
    of these fits but for a null, which the first row may hold, that one is taken.

    Raises DataError, with the row, if no format fits or more than one; ConfigError if `columns` names a column of no format.
    """
    setting = _columns_setting(source)
    _check_columns(columns, [*FORMAT_SPELLINGS], setting)
    row_fields = {name: field for name, field in row.fields.items() if name not in ignored}
    try:
        fields = _rename_columns(row_fields, columns, setting)
    except Refusal as refusal:
        raise DataError(f"{row.file}:{row.line}: {refusal.message}") from None
    filled_fields = {name: field for name, field in fields.items() if field is not None}
    expects_verdicts = DataFormat.thumbs in preferred
    fitting = _fitting_formats(filled_fields, columns, expects_verdicts=expects_verdicts)
    fitting_with_nulls = _fitting_formats(fields, columns, expects_verdicts=expects_verdicts)
    has_preferred = not fitting.keys().isdisjoint(preferred)
    has_preferred_with_nulls = not fitting_with_nulls.keys().isdisjoint(preferred)
    if not fitting or (has_preferred_with_nulls and not has_preferred):
        fitting = fitting_with_nulls
    if len(fitting) == 1:
        return next(iter(fitting))
    for format in preferred:
        if format in fitting:
            return format
    fault = f"{row.file}:{row.line}: columns {_column_names(fields)} fit"
    if fitting:
        advice = _advice_for_several_formats(fitting, setting)
        raise DataError(f"{fault} several formats; {advice}\nthe row: {show_value(fields)}")
    advice = _advice_for_no_format(fields, columns, setting, preferred)
    raise DataError(f"{fault} no format; {advice}\nthe row: {show_value(fields)}{_hint_for_no_format(row)}")


def _columns_setting(source: str) -> str:
    """The setting that renames columns of a source."""
    return "data.columns" if source == "data" else f"data.sources.{source}.columns"


def _advice_for_several_formats(fitting: dict[DataFormat, Spelling], setting: str) -> str:
    """Part of an error message: how to choose between several formats that fit, and which columns each would read."""
    columns_by_format = "\n".join(f"  {format.value}: {', '.join(spelling)}" for format, spelling in fitting.items())
    choice = f"{setting.removesuffix('columns')}format={'|'.join(fitting)}"
    return f"choose with {choice}, or leave columns out with data.ignore_columns\n{columns_by_format}"


def _advice_for_no_format(
    fields: dict[str, Any], columns: dict[str, str], setting: str, preferred: tuple[DataFormat, ...]
) -> str:
    """Part of an error message: how to rename columns so that a format fits, and what each format needs."""
    suggested = {} if columns else suggested_columns(fields)
    example_columns = suggested
    if not suggested:
        likeliest_format = preferred[0] if preferred else DataFormat.prompt_completion
        example_columns = dict.fromkeys(FORMAT_SPELLINGS[likeliest_format][0], "NAME")
    pairs = ",".join(f"{expected}:{name}" for expected, name in example_columns.items())
    example = f"{setting}='{{{pairs}}}'"
    remedy = f"try {example}, or rename them" if suggested else f"rename them with {setting}, as in {example},"
    recognised = [format for format in FORMAT_NEEDS if format is not DataFormat.prompt]
    needs = "\n".join(f"  {format.value}: {FORMAT_NEEDS[format]}" for format in recognised)
    return f"{remedy} to one of\n{needs}"


def _hint_for_no_format(row: Row) -> str:
    """Part of an error message: what a file with such columns often is; empty if that is not known."""
    if "segments" in row.fields:
        return (
            '\nsegments (axolotl\'s input_output): write them as messages, each with "train": true or false, as '
            "a format of spans of one text is not read"
        )
    if row.file.lower().endswith((".csv", ".tsv")):
        return "\nif these names are values, the file lacks a header line: put one on top"
    return ""


def _fitting_formats(
    fields: dict[str, Any], columns: dict[str, str], *, expects_verdicts: bool
) -> dict[DataFormat, Spelling]:
    """The formats that a row's renamed `fields` fit, each with the columns that make it; one that another extends is left out.

    `columns`: the renamed columns, all of which a format must use. `expects_verdicts`: the objective learns from verdicts, so
    that a column `label` holds one, whatever its value.
    """
    # All formats whose columns the row has.
    fitting: dict[DataFormat, Spelling] = {}
    for format, spellings in FORMAT_SPELLINGS.items():
        # Every row with a question has a prompt: that format is meant only where the objective says so.
        if format is DataFormat.prompt:
            continue
        for spelling in spellings:
            uses_renamed_columns = columns.keys() <= {*_readable_columns(spelling, format)}
            if uses_renamed_columns and all(name in fields for name in spelling):
                fitting.setdefault(format, spelling)

    # A label that was not renamed to `label` may be a verdict or a class.
    is_surely_thumbs = True
    thumbs_columns = fitting.get(DataFormat.thumbs, ())
    if "label" in thumbs_columns and "label" not in columns:
        label = fields["label"]
        is_surely_thumbs = str(label) not in ("0", "1")  # 0 and 1 may be classes as well as verdicts
        if label is not None and not expects_verdicts and not is_surely_verdict(label):
            del fitting[DataFormat.thumbs]
    if "conversations" in fitting.get(DataFormat.preference, ()):  # the conversations are the prompt of the pair
        fitting.pop(DataFormat.sharegpt, None)

    # Of two formats, one of which reads all that the other does and more, the fuller one stays.
    extended: set[DataFormat] = set()
    for format in fitting:
        if is_surely_thumbs or format is not DataFormat.thumbs:
            extended |= _EXTENDS.get(format, set())
    fitting = {format: spelling for format, spelling in fitting.items() if format not in extended}
    if len(fitting) > 1 and "content" not in columns and "content" in fitting.get(DataFormat.text, ()):
        del fitting[DataFormat.text]  # too vague a name to stand against a format
    return fitting


def _check_columns(columns: dict[str, str], formats: list[DataFormat], setting: str) -> None:
    """Raise ConfigError if `setting` renames a column to a name that none of the formats reads."""
    readable: dict[str, None] = {}  # in order, each once
    for format in formats:
        for spelling in (*FORMAT_SPELLINGS[format], *_ALSO_READS.get(format, ())):
            readable.update(dict.fromkeys(_readable_columns(spelling, format)))
    for name in columns:
        if name not in readable:
            close_names = difflib.get_close_matches(name, list(readable), n=1)
            hint = f"did you mean {close_names[0]}?" if close_names else f"known are {', '.join(readable)}"
            reader = f"format={formats[0].value}" if len(formats) == 1 else "any format"
            raise ConfigError(f"{setting}.{name}: no column that {reader} reads; {hint}")


def _column_names(fields: dict[str, Any]) -> list[str]:
    """Columns in order of their names; those of objects one level down, with dots."""
    names: list[str] = []
    for name, field in fields.items():
        if isinstance(field, dict) and field:
            names += [f"{name}.{inner}" for inner in field]
        else:
            names.append(name)
    return sorted(names)


def _rename_columns(fields: dict[str, Any], columns: dict[str, str], setting: str) -> dict[str, Any]:
    """A row's fields, with the columns that `columns` names under their expected names. Raises Refusal: missing_column."""
    if not columns:
        return fields
    renamed = {}
    for expected, name in columns.items():
        try:
            renamed[expected] = value_at(fields, name)
        except KeyError:
            message = f"no column {name!r} ({setting}.{expected}); the row has {_column_names(fields)}"
            raise Refusal("missing_column", message) from None
    old_names = set(columns.values())
    unchanged = {name: field for name, field in fields.items() if name not in old_names}
    return {**unchanged, **renamed}


class RowReader:
    """Reads the rows of one source in one format. Raises ConfigError if `columns` cannot belong to it.

    `columns`: the source's name of each renamed column, by the expected name. `label`: reads a label. `ignored` columns
    (`data.ignore_columns`) count as not there. Other columns that are not read are listed by `unread`; a row with a column that
    carries meaning is rejected, unless `take_all` was called. `group`: the column in which every row must have a group. `kept`:
    columns that are kept beside a prompt.
    """

    def __init__(
        self,
        format: DataFormat,
        columns: dict[str, str],
        *,
        source: str,
        label: Callable[[Any], str] = parse_label,
        ignored: Collection[str] = (),
        group: str | None = None,
        kept: KeptColumns | None = None,
    ) -> None:
        self.format = format
        self.columns = dict(columns)
        self.source = source
        self.ignored = frozenset(ignored)
        self.label_of = label
        self.group = group
        self.kept = kept if format is DataFormat.prompt else None
        self._setting = _columns_setting(source)
        kept_names: tuple[str, ...] = ()
        if self.kept is not None:
            kept_names = (*self.kept.required, *self.kept.optional)
        spelled_columns = {name: column for name, column in columns.items() if name not in kept_names}
        if self.kept is None or not self.kept.all:  # a function that takes whatever there is takes any name
            _check_columns(spelled_columns, [format], self._setting)
        likeliest, *other_spellings = FORMAT_SPELLINGS[format]
        # Instructions come before input and output, which they have too.
        spellings = [likeliest, *_ALSO_READS.get(format, ()), *other_spellings]
        optional = {*_CONVERSATION_COLUMNS, *_INSTRUCTION_COLUMNS, *kept_names}
        using_all_renamed = [spelling for spelling in spellings if columns.keys() <= {*spelling, *optional}]
        self._spellings = using_all_renamed or spellings

        columns_in_settings = [*columns.values()]
        if group:
            columns_in_settings.append(group)
        # `a.b` may be a column of that name, or b inside the column a.
        also_read = {*columns_in_settings, *(name.split(".")[0] for name in columns_in_settings), *kept_names}
        if "ground_truth" in kept_names:
            also_read.add("reward_model")  # where verl's data sets have it
        self._read_columns: dict[Spelling, tuple[str, ...]] = {}
        """The columns that are read, by the spelling that a row has."""
        needed_columns = {*MEANINGFUL_COLUMNS[format]}
        for spelling in self._spellings:
            self._read_columns[spelling] = (*_readable_columns(spelling, format), *also_read)
            needed_columns.update(self._read_columns[spelling])
        self.needed_columns = None if self.kept is not None and self.kept.all else frozenset(needed_columns)
        """Columns that decide over a document: of a table no others need be read; None: all are."""
        self.unread = UnreadColumns(MEANINGFUL_COLUMNS[format], self.ignored, self._setting)

    def take_all(self) -> RowReader:
        """From now on, take rows with columns that carry meaning but are not read. Returns the reader."""
        self.unread.refused = ()
        return self

    def __call__(self, row: Row | Rejected) -> Document | Rejected:
        """The document of a parsed row, or why there is none. A rejected row stays so. Never raises for what a row holds."""
        if isinstance(row, Rejected):
            return row
        try:
            return self._make_document(row)
        except Refusal as refusal:
            excerpt = json.dumps(row.fields, ensure_ascii=False, default=str)
            return Rejected(row.file, row.line, refusal.reason, refusal.message, excerpt)

    def _make_document(self, row: Row) -> Document:
        """The document that a row makes in this format. Raises Refusal."""
        fields = row.fields
        if self.ignored:
            fields = {name: field for name, field in fields.items() if name not in self.ignored}
        document = Document(row.file, row.line, self.source)
        document.group = parse_group(fields, self.group) if self.group else None
        fields = _rename_columns(fields, self.columns, self._setting)
        spelling = self._spelling(fields, row.unread_columns)
        read_columns = self._read_columns[spelling]
        for name in read_columns:
            field = fields.get(name)
            if isinstance(field, Fault):
                raise Refusal(field.reason, f'column "{name}": {field.message}')
        self._fill(document, fields, spelling)
        # The columns that go with any conversation: system prompt and tools.
        if self.format not in _WITHOUT_SYSTEM:
            if fields.get("system") not in (None, ""):
                _add_system(document, parse_text(fields, "system"))
            tools = parse_tools(fields.get("tools"))
            if tools:
                document.messages = document.messages or document.take_turns()
                # A template must not write tools once more that the system turn lists already.
                if not lists_all_tools(document.messages[0]["content"], tools):
                    document.tools = tools
        if self.kept is not None:
            document.columns = self.kept.values_of(fields)
            if document.completion is not None:  # the answer at the end of a conversation
                document.columns.setdefault("completion", document.completion)
                document.completion = None
            read_columns = (*read_columns, *document.columns)
        if row.made_columns:
            read_columns = (*read_columns, *row.made_columns)
        self.unread.note(fields, row.unread_columns, read_columns)
        return document

    def _spelling(self, fields: dict[str, Any], unread_columns: tuple[str, ...]) -> Spelling:
        """The columns that the row has for this format, such as (instruction, output) or (prompt, completion).

        A spelling is one set of column names of a format. The first one whose columns the row has is taken, if possible one
        with values. `unread_columns`: further columns of the row, for the message. Raises Refusal: wrong_format.
        """
        filled_columns = {name for name, field in fields.items() if field is not None}
        # A table with columns of two spellings leaves one of them empty in each row.
        for names in (filled_columns, fields.keys()):
            for spelling in self._spellings:
                if names >= {*spelling}:
                    return spelling
        needs = f"{self._setting.removesuffix('columns')}format={self.format.value} needs {FORMAT_NEEDS[self.format]}"
        raise Refusal("wrong_format", f"columns {sorted([*_column_names(fields), *unread_columns])}, but {needs}")

    def _fill(self, document: Document, fields: dict[str, Any], spelling: Spelling) -> None:
        """Fill the document from the columns of `spelling`, such as ("prompt", "completion"). Raises Refusal."""
        last_column = spelling[-1]
        if last_column in ("thumbs", "label") and self.format is DataFormat.thumbs:
            document.desirable = parse_verdict(fields[last_column])
            if document.desirable is None:
                message = f'"{last_column}" is {show_value(fields[last_column])}; it must be {VERDICT_SPELLINGS}'
                raise Refusal("bad_label", message)
            spelling = spelling[:-1]
        if self.format is DataFormat.prompt:
            _read_prompt_alone(document, fields, spelling, self.ignored)
        elif self.format is DataFormat.preference:
            _read_preference(document, fields, spelling, self.ignored)
        elif self.format in (DataFormat.text, DataFormat.labelled):
            document.text = parse_text(fields, spelling[0])
            if self.format is DataFormat.labelled:
                document.label = self.label_of(fields["label"])
        elif len(spelling) == 1:
            turns = parse_turns(fields[spelling[0]], spelling[0], FORMAT_NEEDS[DataFormat.messages], self.ignored)
            document.messages = require_learnable(turns)
        else:
            _read_prompt(document, fields, spelling, self.ignored)


def _readable_columns(spelling: Spelling, format: DataFormat) -> Spelling:
    """The columns that a row of this spelling is read from, those that may be missing included."""
    columns = spelling
    if format not in _WITHOUT_SYSTEM:
        columns += _CONVERSATION_COLUMNS
    if spelling[0] == "instruction":
        columns += _INSTRUCTION_COLUMNS
    return columns


def _read_prompt(document: Document, fields: dict[str, Any], spelling: Spelling, ignored: Collection[str]) -> None:
    """Fill a document with a prompt and its completion, each a text or a list of turns. Raises Refusal.

    If one of the two columns of `spelling` holds turns, the document becomes a conversation.
    """
    prompt_column, completion_column = spelling
    if _is_turns(fields[prompt_column]) or _is_turns(fields[completion_column]):
        prompt_turns = _turns_or_text(fields, prompt_column, "user", ignored)
        completion_turns = _turns_or_text(fields, completion_column, "assistant", ignored)
        for turn in prompt_turns:  # earlier answers are context: what is learned is the completion
            if turn["role"] == "assistant":
                turn.setdefault("train", False)
        if all(turn["role"] != "assistant" for turn in completion_turns):
            message = f'"{completion_column}" has no assistant turn; there is nothing to learn'
            raise Refusal("no_assistant_turn", message)
        document.messages = require_learnable([*prompt_turns, *completion_turns])
        return
    document.prompt = parse_text(fields, prompt_column)
    document.completion = parse_text(fields, completion_column)
    # By custom "prompt" and "completion" hold the separator between them; columns of other names do not.
    document.separator = "" if spelling == ("prompt", "completion") else "\n\n"
    if prompt_column == "instruction":
        for column in ("input", "context"):
            if fields.get(column) not in (None, ""):
                document.prompt += "\n\n" + parse_text(fields, column)
        if not is_blank_value(fields.get("history")):
            earlier = parse_history(fields["history"])
            document.messages = [*earlier, *document.take_turns()]


def _read_prompt_alone(
    document: Document, fields: dict[str, Any], spelling: Spelling, ignored: Collection[str]
) -> None:
    """Fill a document with a prompt. An answer at the end of a conversation becomes its completion. Raises Refusal."""
    column = spelling[0]
    if not _is_turns(fields[column]):
        document.prompt = parse_text(fields, column)
        if column == "instruction" and fields.get("input") not in (None, ""):
            document.prompt += "\n\n" + parse_text(fields, "input")
        return
    turns = _turns_or_text(fields, column, "user", ignored)
    while turns and turns[-1]["role"] == "assistant":
        document.completion = turns.pop()["content"]
    if not turns:
        raise Refusal("no_prompt", f'"{column}" has no turn before its answer')
    document.messages = turns


def _is_turns(field: Any) -> bool:
    """Whether a field holds turns, or one turn, rather than a text."""
    return isinstance(field, list | dict) and not is_list_of_texts(field)


def _turns_or_text(fields: dict[str, Any], name: str, role: str, ignored: Collection[str]) -> list[Message]:
    """The turns of a column that holds a text, one message, or a list of messages. A text is a turn of `role`."""
    field = fields[name]
    if _is_turns(field):
        turns = [field] if isinstance(field, dict) else field
        return parse_turns(turns, name, FORMAT_NEEDS[DataFormat.messages], ignored)
    return [{"role": role, "content": parse_text(fields, name)}]


def _read_preference(document: Document, fields: dict[str, Any], spelling: Spelling, ignored: Collection[str]) -> None:
    """Fill a document with a pair of answers; their prompt is in a column, or at the beginning of both. Raises Refusal."""
    has_prompt_column = len(spelling) > 2
    prompt = _turns_or_text(fields, spelling[0], "user", ignored) if has_prompt_column else []
    answers = []
    for name in ("chosen", "rejected"):
        if not has_prompt_column and isinstance(fields[name], str):
            answers.append(parse_turns(fields[name], name, ""))  # a transcript
        else:
            answers.append(_turns_or_text(fields, name, "assistant", ignored))
    document.messages, document.chosen, document.rejected = split_pair(prompt, *answers)


def _add_system(document: Document, system: str) -> None:
    """Put the text of a "system" column before the conversation; a prompt and its completion become one.

    Raises Refusal if the conversation has a system turn that differs.
    """
    if document.prompt is not None:
        document.messages = document.take_turns()
    messages = document.messages or []
    if messages and messages[0]["role"] == "system":
        if messages[0]["content"] != system:
            raise Refusal("two_system_turns", 'the "system" column differs from the system turn of the conversation')
        return
    document.messages = [{"role": "system", "content": system}, *messages]

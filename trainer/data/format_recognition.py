"""Recognises which of ten formats a row has, by its columns; renames columns as `data.columns` says, and suggests how.

Columns that fit several formats, and columns that fit none, are errors: a guess here would train on the wrong text.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection
from typing import Any

from strategies.errors import ConfigError, DataError
from trainer.data.config import DataFormat
from trainer.data.document import SourceRow
from trainer.data.fields import RowError, is_surely_verdict, show_value, value_at

REQUIRED_COLUMNS_TEXT_BY_FORMAT = {
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
REQUIRED_TURNS_TEXT = REQUIRED_COLUMNS_TEXT_BY_FORMAT[DataFormat.messages]
ColumnSet = tuple[str, ...]
"""Names of columns that make a format together, such as ("prompt", "completion") or ("question", "answer")."""
_COLUMN_SETS_TEXT_BY_FORMAT = {  # the columns that make a format, likeliest set first
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
COLUMN_SETS_BY_FORMAT: dict[DataFormat, list[ColumnSet]] = {}
"""For each format the sets of columns that make it, likeliest first."""
for _format, _text in _COLUMN_SETS_TEXT_BY_FORMAT.items():
    COLUMN_SETS_BY_FORMAT[_format] = [tuple(column_set.split()) for column_set in _text.split("|")]
_CONVERSATION_COLUMNS = ("system", "tools")
FORMATS_WITHOUT_SYSTEM = (DataFormat.auto, DataFormat.pair, DataFormat.labelled, DataFormat.text)
_INSTRUCTION_COLUMNS = ("input", "context", "history")
_FURTHER_COLUMN_SETS_BY_FORMAT = {  # a format that the user named reads these sets of columns too
    DataFormat.messages: COLUMN_SETS_BY_FORMAT[DataFormat.sharegpt],
    DataFormat.sharegpt: COLUMN_SETS_BY_FORMAT[DataFormat.messages],
    DataFormat.prompt_completion: COLUMN_SETS_BY_FORMAT[DataFormat.alpaca],
}
_LESS_FULL_BY_FORMAT = {  # a format reads all columns of these formats, and more: if both fit, the fuller one is meant
    DataFormat.labelled: {DataFormat.text},
    DataFormat.alpaca: {DataFormat.text, DataFormat.prompt_completion},  # the Alpaca set has its rendering as text
    DataFormat.thumbs: {DataFormat.messages, DataFormat.prompt_completion},
}


def recognise_format(
    row: SourceRow,
    renamed_columns: dict[str, str],
    *,
    source: str = "data",
    ignored: Collection[str] = (),
    preferred: tuple[DataFormat, ...] = (),
) -> DataFormat:
    """Recognise the format of a source by the columns of its first readable row, if the settings name none.

    A column that is null, or `ignored`, counts as missing.
    - One format fits: that one.
    - Several fit: the first of the `preferred` formats among them, those that the objective can learn from.
    - None fits, or no preferred one, and a (preferred) format would fit if null counted as a value: that one, since the first row
      of a file may hold a null.

    `renamed_columns`: `data.columns` of the `source`, the row's name of a column by the expected name. A format that does not use
    all of them does not fit. Raises DataError, with the row, if no format or more than one fits; ConfigError if a column is
    renamed that no format reads.
    """
    setting = columns_setting(source)
    require_readable_columns(renamed_columns, [*COLUMN_SETS_BY_FORMAT], setting)
    row_fields = {name: value for name, value in row.fields.items() if name not in ignored}
    try:
        fields = rename_columns(row_fields, renamed_columns, setting)
    except RowError as refusal:
        raise DataError(f"{row.file}:{row.line}: {refusal.message}") from None

    filled_fields = {name: value for name, value in fields.items() if value is not None}
    learns_verdicts = DataFormat.thumbs in preferred
    column_set_by_format = _column_sets_of_fitting_formats(
        filled_fields, renamed_columns, learns_verdicts=learns_verdicts
    )
    with_nulls = _column_sets_of_fitting_formats(fields, renamed_columns, learns_verdicts=learns_verdicts)
    no_preferred_fits = column_set_by_format.keys().isdisjoint(preferred)
    null_hides_preferred = no_preferred_fits and not with_nulls.keys().isdisjoint(preferred)
    if not column_set_by_format or null_hides_preferred:
        column_set_by_format = with_nulls

    if len(column_set_by_format) == 1:
        return next(iter(column_set_by_format))
    for format in preferred:
        if format in column_set_by_format:
            return format
    fault = f"{row.file}:{row.line}: columns {column_names(fields)} fit"
    if column_set_by_format:
        advice = _advice_for_several_formats(column_set_by_format, setting)
        raise DataError(f"{fault} several formats; {advice}\nthe row: {show_value(fields)}")
    advice = _advice_for_no_format(fields, renamed_columns, setting, preferred)
    raise DataError(f"{fault} no format; {advice}\nthe row: {show_value(fields)}{_hint_for_no_format(row)}")


def columns_setting(source: str) -> str:
    """The name of the setting that renames columns of a source, such as `data.sources.faq.columns`."""
    return "data.columns" if source == "data" else f"data.sources.{source}.columns"


def format_setting(source: str) -> str:
    """The name of the setting that says the format of a source, such as `data.sources.faq.format`."""
    return f"{columns_setting(source).removesuffix('columns')}format"


def _advice_for_several_formats(column_set_by_format: dict[DataFormat, ColumnSet], columns_setting: str) -> str:
    """Write the part of an error message that says how to choose between formats that all fit, and what each would read."""
    format_lines = [f"  {format.value}: {', '.join(column_set)}" for format, column_set in column_set_by_format.items()]
    choice = f"{columns_setting.removesuffix('columns')}format={'|'.join(column_set_by_format)}"
    return "\n".join([f"choose with {choice}, or leave columns out with data.ignore_columns", *format_lines])


def _advice_for_no_format(
    fields: dict[str, Any], renamed_columns: dict[str, str], columns_setting: str, preferred: tuple[DataFormat, ...]
) -> str:
    """Write the part of an error message that says how to rename columns so that a format fits, and what each format needs.

    For example "try data.columns='{prompt:query,completion:answer}', or rename them to one of ...". `renamed_columns`: what the
    user renamed already; nothing is suggested then, and the example has placeholders. `preferred`: the formats that the
    objective learns from.
    """
    suggested_columns = {} if renamed_columns else suggest_columns(fields)
    likeliest_format = preferred[0] if preferred else DataFormat.prompt_completion
    example_columns = suggested_columns or dict.fromkeys(COLUMN_SETS_BY_FORMAT[likeliest_format][0], "NAME")
    pairs = ",".join(f"{expected}:{name}" for expected, name in example_columns.items())
    example = f"{columns_setting}='{{{pairs}}}'"
    if suggested_columns:
        remedy = f"try {example}, or rename them"
    else:
        remedy = f"rename them with {columns_setting}, as in {example},"
    # Prompts alone are never recognised, so that they are no help here.
    recognised_formats = [format for format in REQUIRED_COLUMNS_TEXT_BY_FORMAT if format is not DataFormat.prompt]
    needs = "\n".join(f"  {format.value}: {REQUIRED_COLUMNS_TEXT_BY_FORMAT[format]}" for format in recognised_formats)
    return f"{remedy} to one of\n{needs}"


def _hint_for_no_format(row: SourceRow) -> str:
    """Write the part of an error message that says what a file with such columns often is; empty if that is not known."""
    if "segments" in row.fields:
        return (
            '\nsegments (axolotl\'s input_output): write them as messages, each with "train": true or false, as '
            "a format of spans of one text is not read"
        )
    if row.file.lower().endswith((".csv", ".tsv")):
        return "\nif these names are values, the file lacks a header line: put one on top"
    return ""


def _column_sets_of_fitting_formats(
    fields: dict[str, Any], renamed_columns: dict[str, str], *, learns_verdicts: bool
) -> dict[DataFormat, ColumnSet]:
    """Find the formats that a row fits, each with the set of columns by which it fits. Ambiguities are resolved:

    - a column `label` makes thumbs (verdicts on answers) only if it is surely a verdict, or if the objective learns verdicts;
    - conversations beside a chosen and a rejected answer are the prompt of a pair;
    - of two formats of which one reads all columns of the other and more, the fuller one stays;
    - `content` alone is too vague a name to make a text if another format fits.

    `fields`: the row's values under the expected names. `renamed_columns`: what the user renamed, the row's name by the expected
    one. `learns_verdicts`: whether the objective learns from thumbs up and down.
    """
    column_set_by_format = _column_sets_that_row_has(fields, renamed_columns)

    # A label 0 or 1 may be a class as well as a verdict: then neither thumbs nor labelled texts replace the other.
    may_be_class = False
    is_label_recognised = "label" in column_set_by_format.get(DataFormat.thumbs, ()) and "label" not in renamed_columns
    if is_label_recognised:  # the user has not said that it is the verdict
        label = fields["label"]
        may_be_class = str(label) in ("0", "1")
        if label is not None and not learns_verdicts and not is_surely_verdict(label):
            del column_set_by_format[DataFormat.thumbs]
    if "conversations" in column_set_by_format.get(DataFormat.preference, ()):
        column_set_by_format.pop(DataFormat.sharegpt, None)

    less_full_formats: set[DataFormat] = set()
    for format in column_set_by_format:
        if not (may_be_class and format is DataFormat.thumbs):
            less_full_formats |= _LESS_FULL_BY_FORMAT.get(format, set())
    for format in less_full_formats:
        column_set_by_format.pop(format, None)
    is_text_by_content = "content" not in renamed_columns and "content" in column_set_by_format.get(DataFormat.text, ())
    if is_text_by_content and len(column_set_by_format) > 1:
        del column_set_by_format[DataFormat.text]
    return column_set_by_format


def _column_sets_that_row_has(fields: dict[str, Any], renamed_columns: dict[str, str]) -> dict[DataFormat, ColumnSet]:
    """Find the formats of which the row has a whole set of columns, each with the likeliest such set.

    {"question": ..., "answer": ...} has {prompt_completion: ("question", "answer")}. Only sets that read all renamed columns
    count. `prompt` is never among them: every row with a question has a prompt, so that this format is meant only if the
    objective says so.
    """
    column_set_by_format: dict[DataFormat, ColumnSet] = {}
    for format, column_sets in COLUMN_SETS_BY_FORMAT.items():
        if format is DataFormat.prompt:
            continue
        for column_set in column_sets:
            reads_renamed_columns = renamed_columns.keys() <= {*readable_columns(column_set, format)}
            if reads_renamed_columns and all(name in fields for name in column_set):
                column_set_by_format.setdefault(format, column_set)
    return column_set_by_format


def require_readable_columns(renamed_columns: dict[str, str], formats: list[DataFormat], setting: str) -> None:
    """Raise ConfigError if the setting `setting` renames a column to a name that no format reads, such as a misspelled one.

    `renamed_columns`: the value of the setting, the row's name of a column by the expected name, such as {"prompt":
    "question_text"}. `formats`: those that the source may have.
    """
    known_columns: dict[str, None] = {}  # a dict, to keep the order
    for format in formats:
        for column_set in (*COLUMN_SETS_BY_FORMAT[format], *_FURTHER_COLUMN_SETS_BY_FORMAT.get(format, ())):
            known_columns.update(dict.fromkeys(readable_columns(column_set, format)))
    for expected_name in renamed_columns:
        if expected_name in known_columns:
            continue
        close_names = difflib.get_close_matches(expected_name, list(known_columns), n=1)
        hint = f"did you mean {close_names[0]}?" if close_names else f"known are {', '.join(known_columns)}"
        reader = f"format={formats[0].value}" if len(formats) == 1 else "any format"
        raise ConfigError(f"{setting}.{expected_name}: no column that {reader} reads; {hint}")


def column_names(fields: dict[str, Any]) -> list[str]:
    """The names of a row's columns, sorted. An object gives the names inside of it: {"a": 1, "b": {"c": 2}} -> ["a", "b.c"]."""
    names: list[str] = []
    for name, value in fields.items():
        if isinstance(value, dict) and value:
            names += [f"{name}.{inner_name}" for inner_name in value]
        else:
            names.append(name)
    return sorted(names)


def rename_columns(fields: dict[str, Any], renamed_columns: dict[str, str], setting: str) -> dict[str, Any]:
    """Put the renamed columns of a row under their expected names. Raises RowError (missing_column) if one is missing.

    `renamed_columns`: the row's name of a column by the expected name: {"prompt": "q"} turns {"q": "Hi", "a": 1} into {"a": 1,
    "prompt": "Hi"}. `setting`: where they come from, for the message.
    """
    if not renamed_columns:
        return fields
    renamed = {}
    for expected_name, row_name in renamed_columns.items():
        try:
            renamed[expected_name] = value_at(fields, row_name)
        except KeyError:
            message = f"no column {row_name!r} ({setting}.{expected_name}); the row has {column_names(fields)}"
            raise RowError("missing_column", message) from None
    row_names = set(renamed_columns.values())
    unchanged = {name: value for name, value in fields.items() if name not in row_names}
    return {**unchanged, **renamed}


def column_sets_to_try(
    format: DataFormat, renamed_columns: dict[str, str], kept_names: tuple[str, ...]
) -> list[ColumnSet]:
    """List the sets of columns by which a row may fit a format, in the order in which they are tried: [("text",), ("content",)].

    If some sets use all `renamed_columns` (the row's name of a column by the expected name), only these. `kept_names`: columns
    that are kept beside a prompt, and that may be renamed as well.
    """
    likeliest, *other_spellings = COLUMN_SETS_BY_FORMAT[format]
    # The further ones come early: a row with an instruction may have input and output, too, which are a set of their own.
    column_sets = [likeliest, *_FURTHER_COLUMN_SETS_BY_FORMAT.get(format, ()), *other_spellings]
    optional_columns = {*_CONVERSATION_COLUMNS, *_INSTRUCTION_COLUMNS, *kept_names}
    using_all_renamed = [
        column_set for column_set in column_sets if renamed_columns.keys() <= {*column_set, *optional_columns}
    ]
    return using_all_renamed or column_sets


def readable_columns(column_set: ColumnSet, format: DataFormat) -> ColumnSet:
    """All columns that are read of a row with this set of columns: these, and those that it may have beside them.

    A prompt may have a system text and tools beside it, an instruction its input and earlier turns.
    """
    columns = column_set
    if format not in FORMATS_WITHOUT_SYSTEM:
        columns += _CONVERSATION_COLUMNS
    if column_set[0] == "instruction":
        columns += _INSTRUCTION_COLUMNS
    return columns


_PROMPT_COLUMNS = ("prompt", "question", "query", "instruction", "problem", "input")
_COMPLETION_COLUMNS = ("completion", "response", "answer", "output", "solution", "answers.text.0")
_CHOSEN_COLUMNS = ("chosen", "chosen_messages")
_REJECTED_COLUMNS = ("rejected", "rejected_messages")
_SYSTEM_COLUMNS = ("system", "system_prompt")
_PASSAGE_COLUMNS = ("context", "passage")


def suggest_columns(fields: dict[str, Any]) -> dict[str, str]:
    """Guess which renaming of columns (`data.columns`) is meant, for an error message: {"prompt": "query", "completion": ...}.

    The row's column by the expected name; empty if nothing seems to fit.
    - an answer that is chosen and one that is rejected: a pair, with its prompt if there is one;
    - a prompt, a passage and a completion: an instruction with its input;
    - a prompt and a completion: both, with a system prompt if there is one.

    `fields`: the row's values by column.
    """
    prompt = _first_filled_column(fields, _PROMPT_COLUMNS)
    chosen = _first_filled_column(fields, _CHOSEN_COLUMNS)
    rejected = _first_filled_column(fields, _REJECTED_COLUMNS)
    if chosen and rejected:
        columns = {"chosen": chosen, "rejected": rejected}
        if prompt:
            columns["prompt"] = prompt
        return columns
    completion = _first_filled_column(fields, _COMPLETION_COLUMNS)
    if not prompt or not completion:
        return {}
    passage = _first_filled_column(fields, _PASSAGE_COLUMNS)
    if passage:
        return {"instruction": prompt, "input": passage, "output": completion}
    columns = {"prompt": prompt, "completion": completion}
    system = _first_filled_column(fields, _SYSTEM_COLUMNS)
    if system:
        columns["system"] = system
    return columns


def _first_filled_column(fields: dict[str, Any], names: tuple[str, ...]) -> str | None:
    """Find the first of `names` under which the row has a value, as the row spells it; None if it has none of them.

    Names are compared without regard to case: `names` ("prompt",) and a column "Prompt" give "Prompt". `a.b` is `b` inside the
    column `a`.
    """
    row_name_by_lower_case = {name.lower(): name for name in fields}
    for name in names:
        column = row_name_by_lower_case.get(name, name)
        try:
            value = value_at(fields, column)
        except (KeyError, RowError):  # there is none, or it could not be read
            continue
        if value is not None:
            return column
    return None

"""Reads the rows of a source in one of ten formats: makes a document of every row that fits.

A row that cannot be a document is `RejectedRow` with a reason and a message, never changed to fit.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from typing import Any

from trainer.data.config import DataFormat
from trainer.data.document import Document, Message, RejectedRow, SourceRow
from trainer.data.fields import (
    MEANINGFUL_COLUMNS,
    VERDICT_SPELLINGS,
    KeptColumns,
    RowError,
    UnreadableValue,
    UnreadColumns,
    is_blank_value,
    is_list_of_texts,
    parse_group,
    parse_label,
    parse_text,
    parse_verdict,
    show_value,
)
from trainer.data.format_recognition import (
    FORMATS_WITHOUT_SYSTEM,
    REQUIRED_COLUMNS_TEXT_BY_FORMAT,
    REQUIRED_TURNS_TEXT,
    ColumnSet,
    column_names,
    column_sets_to_try,
    columns_setting,
    format_setting,
    readable_columns,
    rename_columns,
    require_readable_columns,
)
from trainer.data.messages import (
    lists_all_tools,
    parse_history,
    parse_tools,
    parse_transcript,
    parse_turns,
    require_learnable,
    split_pair,
)


class RowReader:
    """Turns the rows of one source into documents of one format, such as conversations or preference pairs.

    `unread` lists columns that nothing reads. A row with an unread column that carries meaning is rejected, unless
    `accept_unread_columns` was called.
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
        """Set up the reader of one source. Raises ConfigError if `columns` cannot belong to the format.

        - `columns`: the source's name of each renamed column, by the expected name.
        - `label`: turns the value of the column `label` into a text.
        - `ignored`: columns (`data.ignore_columns`) that count as missing.
        - `group`: the column that says which group a row belongs to; every row must have it. None: rows have no groups.
        - `kept`: columns that are kept beside a prompt, for rewards; they count only with the format `prompt`.
        """
        self.format = format
        self.columns = dict(columns)
        self.source = source
        self.ignored = frozenset(ignored)
        self.parse_label = label
        self.group = group
        self.kept = kept if format is DataFormat.prompt else None
        self._setting = columns_setting(source)
        keeps_all_columns = self.kept is not None and self.kept.keeps_all
        kept_names: tuple[str, ...] = ()
        if self.kept is not None:
            kept_names = (*self.kept.required, *self.kept.optional)
        if not keeps_all_columns:  # a reward function that takes all columns takes any name
            renamed_for_format = {name: column for name, column in columns.items() if name not in kept_names}
            require_readable_columns(renamed_for_format, [format], self._setting)
        self._column_sets = column_sets_to_try(format, columns, kept_names)

        self._read_columns_by_column_set: dict[ColumnSet, tuple[str, ...]] = {}
        """The columns that are read, by the set of columns that make the format in a row."""
        read_with_any_column_set = self._columns_read_with_any_column_set(kept_names)
        needed_columns = {*MEANINGFUL_COLUMNS[format]}
        for column_set in self._column_sets:
            self._read_columns_by_column_set[column_set] = (
                *readable_columns(column_set, format),
                *read_with_any_column_set,
            )
            needed_columns.update(self._read_columns_by_column_set[column_set])
        self.needed_columns = None if keeps_all_columns else frozenset(needed_columns)
        """The only columns of a table that have to be read from its file; None: all are needed."""
        self.unread = UnreadColumns(MEANINGFUL_COLUMNS[format], self.ignored, self._setting)

    def _columns_read_with_any_column_set(self, kept_names: tuple[str, ...]) -> set[str]:
        """Columns that are read whatever columns make the format in a row: those that settings name, and those kept for rewards.

        `kept_names`: names of the latter.
        """
        named_in_settings = [*self.columns.values()]
        if self.group:
            named_in_settings.append(self.group)
        # `a.b` may be a column of that name, or b inside the column a.
        outer_names = [name.split(".")[0] for name in named_in_settings]
        read_columns = {*named_in_settings, *outer_names, *kept_names}
        if "ground_truth" in kept_names:
            read_columns.add("reward_model")  # where verl's data sets have it
        return read_columns

    def accept_unread_columns(self) -> None:
        """From now on, accept rows with columns that carry meaning but are not read."""
        self.unread.meaningful = ()

    def __call__(self, row: SourceRow | RejectedRow) -> Document | RejectedRow:
        """Turn a parsed row into a document, or say why it is none: it was rejected before, or does not fit the format.

        Never raises for what a row holds.
        """
        if isinstance(row, RejectedRow):
            return row
        try:
            return self._make_document(row)
        except RowError as refusal:
            excerpt = json.dumps(row.fields, ensure_ascii=False, default=str)
            return RejectedRow(row.file, row.line, refusal.reason, refusal.message, excerpt, row_number=row.row_number)

    def _make_document(self, row: SourceRow) -> Document:
        """Turn a row into a document of the source's format; raises RowError if it does not fit.

        Renames columns as the settings say, finds which columns make the format in this row, and reads them. Adds columns that
        nothing read to `unread`, which rejects the row for one that carries meaning, such as images.
        """
        fields = row.fields
        if self.ignored:
            fields = {name: value for name, value in fields.items() if name not in self.ignored}
        document = Document(row.file, row.line, self.source, row_number=row.row_number)
        document.group = parse_group(fields, self.group) if self.group else None
        # From here on, `fields` has the names that we expect.
        fields = rename_columns(fields, self.columns, self._setting)
        # The names of the columns that make the format in this row.
        column_set = self._find_column_set(fields, row.unread_columns)
        read_columns = self._read_columns_by_column_set[column_set]
        # An `UnreadableValue` stands for a value that could not be read, which matters only in a column that is read.
        for name in read_columns:
            value = fields.get(name)
            if isinstance(value, UnreadableValue):
                raise RowError(value.reason, f'column "{name}": {value.message}')
        self._fill_document(document, fields, column_set)
        # A system text and tools may stand beside any conversation.
        if self.format not in FORMATS_WITHOUT_SYSTEM:
            _add_system_and_tools(document, fields)
        # Columns that rewards read, such as the right answer to a problem.
        if self.kept is not None:
            kept_names = self._keep_columns(document, fields, self.kept)
            read_columns = (*read_columns, *kept_names)
        # Raises RowError for a column that carries meaning and is not read, such as images.
        self.unread.add_from_row(fields, row.unread_columns, (*read_columns, *row.derived_columns))
        return document

    @staticmethod
    def _keep_columns(document: Document, fields: dict[str, Any], kept: KeptColumns) -> dict[str, Any]:
        """Keep the columns beside a prompt that rewards read, to compare an answer with: set `document.columns`, and return them.

        The answer that the row has is not learned: it becomes the kept column "completion".
        """
        document.columns = kept.values_of(fields)
        if document.completion is not None:
            document.columns.setdefault("completion", document.completion)
            document.completion = None
        return document.columns

    def _find_column_set(self, fields: dict[str, Any], unread_columns: tuple[str, ...]) -> ColumnSet:
        """Find the columns that make this format in a row, such as ("instruction", "output") or ("prompt", "completion").

        A format has several such sets. The first is taken of which the row has every column with a value; if there is none, the
        first of which it has every column. `unread_columns`: further columns of the row, for the message. Raises RowError:
        wrong_format.
        """
        filled_columns = {name for name, value in fields.items() if value is not None}
        # A table with two such sets of columns leaves one of them empty in each row.
        for present_columns in (filled_columns, fields.keys()):
            for column_set in self._column_sets:
                if present_columns >= {*column_set}:
                    return column_set
        # As in "data.format=text needs "text": a text".
        needs = (
            f"{format_setting(self.source)}={self.format.value} needs {REQUIRED_COLUMNS_TEXT_BY_FORMAT[self.format]}"
        )
        raise RowError("wrong_format", f"columns {sorted([*column_names(fields), *unread_columns])}, but {needs}")

    def _fill_document(self, document: Document, fields: dict[str, Any], column_set: ColumnSet) -> None:
        """Fill a document with what a row has in the columns that make its format, such as ("prompt", "completion").

        `fields`: the row's values, by the expected names of columns. `column_set`: names of those that make the format. Which
        attributes of the document are set depends on the format. Raises RowError if a value is of the wrong kind.
        """
        if self.format is DataFormat.thumbs:
            # The last column is the verdict; those before it are what is judged: a prompt with completion, or a conversation.
            *judged_columns, verdict_column = column_set
            document.desirable = parse_verdict(fields[verdict_column])
            if document.desirable is None:
                message = f'"{verdict_column}" is {show_value(fields[verdict_column])}; it must be {VERDICT_SPELLINGS}'
                raise RowError("bad_label", message)
            column_set = tuple(judged_columns)
        # By format: which columns hold a prompt, an answer, turns, a text.
        if self.format is DataFormat.prompt:
            _read_prompt_alone(document, fields, column_set, self.ignored)
        elif self.format is DataFormat.preference:
            _read_preference(document, fields, column_set, self.ignored)
        elif self.format in (DataFormat.text, DataFormat.labelled):
            document.text = parse_text(fields, column_set[0])
            if self.format is DataFormat.labelled:
                document.label = self.parse_label(fields["label"])
        elif len(column_set) == 1:  # a conversation
            column = column_set[0]
            document.messages = require_learnable(
                parse_turns(fields[column], column, REQUIRED_TURNS_TEXT, self.ignored)
            )
        else:
            _read_prompt_and_completion(document, fields, column_set, self.ignored)


def _read_prompt_and_completion(
    document: Document, fields: dict[str, Any], column_set: ColumnSet, ignored: Collection[str]
) -> None:
    """Fill a document from a column for the prompt and one for the completion. Raises RowError.

    `column_set`: their names, such as ("question", "answer"). `ignored`: keys of turns that are left out.
    - One of them holds turns: the document becomes a conversation (`messages`).
    - Both are texts: `prompt`, `completion` and `separator`. An instruction is followed by its input, and earlier turns in
      `history` make the document a conversation.

    `fields`: the row's values by column.
    """
    prompt_column, completion_column = column_set
    if _holds_turns(fields[prompt_column]) or _holds_turns(fields[completion_column]):
        document.messages = _join_prompt_and_completion_turns(fields, prompt_column, completion_column, ignored)
        return
    document.prompt = parse_text(fields, prompt_column)
    document.completion = parse_text(fields, completion_column)
    # By custom "prompt" and "completion" hold the separator between them; columns of other names do not.
    document.separator = "" if column_set == ("prompt", "completion") else "\n\n"
    if prompt_column == "instruction":
        for column in ("input", "context"):
            if fields.get(column) not in (None, ""):
                document.prompt += "\n\n" + parse_text(fields, column)
        if not is_blank_value(fields.get("history")):
            earlier_turns = parse_history(fields["history"])
            document.messages = [*earlier_turns, *document.pop_prompt_turns()]


def _join_prompt_and_completion_turns(
    fields: dict[str, Any], prompt_column: str, completion_column: str, ignored: Collection[str]
) -> list[Message]:
    """Make one conversation of a prompt and its completion, where at least one column holds turns; the other may be a text.

    `ignored`: keys of turns that are left out. Answers in the prompt are context: they get `"train": False`, unless the row says
    otherwise. Raises RowError, also if there is nothing to learn.
    """
    prompt_turns = _read_turns_or_text(fields, prompt_column, "user", ignored)
    completion_turns = _read_turns_or_text(fields, completion_column, "assistant", ignored)
    for turn in prompt_turns:
        if turn["role"] == "assistant":
            turn.setdefault("train", False)
    # `require_learnable` would be content with an answer in the prompt.
    if all(turn["role"] != "assistant" for turn in completion_turns):
        message = f'"{completion_column}" has no assistant turn; there is nothing to learn'
        raise RowError("no_assistant_turn", message)
    return require_learnable([*prompt_turns, *completion_turns])


def _read_prompt_alone(
    document: Document, fields: dict[str, Any], column_set: ColumnSet, ignored: Collection[str]
) -> None:
    """Fill a document with a prompt, to which the model is to write answers, from its one column. Raises RowError.

    - The column is a text: `prompt`, with the column `input` behind an instruction.
    - It holds turns: `messages` up to the last turn that is no answer. The first of the answers behind it becomes the
      `completion`, since it is what the model is to give there.
    `ignored`: keys of turns that are left out.
    """
    column = column_set[0]
    if not _holds_turns(fields[column]):
        document.prompt = parse_text(fields, column)
        if column == "instruction" and fields.get("input") not in (None, ""):
            document.prompt += "\n\n" + parse_text(fields, "input")
        return
    turns = _read_turns_or_text(fields, column, "user", ignored)
    while turns and turns[-1]["role"] == "assistant":
        document.completion = turns.pop()["content"]
    if not turns:
        raise RowError("no_prompt", f'"{column}" has no turn before its answer')
    document.messages = turns


def _holds_turns(value: Any) -> bool:
    """Whether the value of a column holds turns, or one turn, rather than a text."""
    return isinstance(value, list | dict) and not is_list_of_texts(value)


def _read_turns_or_text(fields: dict[str, Any], column: str, role: str, ignored: Collection[str]) -> list[Message]:
    """Read the turns of a column that holds a text, one message, or a list of messages. A text becomes one turn of `role`.

    `ignored`: keys of turns that are left out. Raises RowError.
    """
    value = fields[column]
    if _holds_turns(value):
        turns = [value] if isinstance(value, dict) else value
        return parse_turns(turns, column, REQUIRED_TURNS_TEXT, ignored)
    return [{"role": role, "content": parse_text(fields, column)}]


def _read_preference(
    document: Document, fields: dict[str, Any], column_set: ColumnSet, ignored: Collection[str]
) -> None:
    """Fill a document with a preference pair: the shared prompt as `messages`, and the answers `chosen` and `rejected`.

    The prompt is in the first of three columns. If there are only two, each holds a whole conversation, and the prompt is what
    both begin with. The answers are always in the columns "chosen" and "rejected". `column_set`: the names of the two or three
    columns. `ignored`: keys of turns that are left out. Raises RowError.
    """
    has_prompt_column = len(column_set) == 3
    prompt_turns = _read_turns_or_text(fields, column_set[0], "user", ignored) if has_prompt_column else []

    def read_answer_turns(column: str) -> list[Message]:
        """The turns of "chosen" or "rejected"; a text without a prompt column is a transcript of the whole conversation."""
        if not has_prompt_column and isinstance(fields[column], str):
            return parse_transcript(fields[column], column)
        return _read_turns_or_text(fields, column, "assistant", ignored)

    pair = split_pair(prompt_turns, read_answer_turns("chosen"), read_answer_turns("rejected"))
    document.messages = pair.prompt
    document.chosen = pair.chosen
    document.rejected = pair.rejected


def _add_system_and_tools(document: Document, fields: dict[str, Any]) -> None:
    """Add the columns "system" and "tools" of a row to its document, if the row has them. Raises RowError.

    A document with a prompt and a completion becomes a conversation by that: `messages`.
    """
    if fields.get("system") not in (None, ""):
        _add_system(document, parse_text(fields, "system"))
    tools = parse_tools(fields.get("tools"))
    if tools:
        document.messages = document.messages or document.pop_prompt_turns()
        # A template must not write tools once more that the first turn, usually the system turn, lists already.
        if not lists_all_tools(document.messages[0]["content"], tools):
            document.tools = tools


def _add_system(document: Document, system: str) -> None:
    """Put the text of a row's "system" column before its conversation; a prompt and its completion become a conversation.

    Does nothing if the conversation begins with this system turn. Raises RowError if it begins with another one.
    """
    if document.prompt is not None:
        document.messages = document.pop_prompt_turns()
    messages = document.messages or []
    if messages and messages[0]["role"] == "system":
        if messages[0]["content"] != system:
            raise RowError("two_system_turns", 'the "system" column differs from the system turn of the conversation')
        return
    document.messages = [{"role": "system", "content": system}, *messages]

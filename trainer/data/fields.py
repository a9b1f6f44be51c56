"""Reads single values of a row (a text, a label, a verdict, a group), and notes the columns that nothing reads.

A value of another type refuses the row. A picture, an earlier turn or a thought that the model would never see changes what its
answers mean. So a column with such a value is refused if the format does not read it: a person has to say whether it is read
under another name (`data.columns`) or left out (`data.ignore_columns`). Any other unread column is named once a source.
"""

from __future__ import annotations

import reprlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from trainer.data.config import DataFormat

_SURE_VERDICT_BY_TEXT = {"up": True, "true": True, "1": True, "down": False, "false": False, "0": False}
"""Texts that only a verdict has."""
_POSSIBLE_VERDICT_BY_TEXT = {
    "yes": True,
    "desirable": True,
    "1.0": True,
    "no": False,
    "undesirable": False,
    "0.0": False,
}
"""Texts that may be a class label too."""
VERDICT_SPELLINGS = "true or false, 1 or 0, yes or no, up or down, desirable or undesirable"
"""The values of a verdict, for messages."""
_SHORT_REPR = reprlib.Repr()
_SHORT_REPR.maxstring = _SHORT_REPR.maxother = _SHORT_REPR.maxlong = 60  # characters
_SHORT_REPR.maxlevel = 3
_SHORT_REPR.maxdict = 8
_SHORT_REPR.maxlist = 4


@dataclass(frozen=True, slots=True)
class UnreadableValue:
    """Stands in a row in place of a value that could not be read, and says why."""

    reason: str
    message: str

    def __str__(self) -> str:
        return f"<{self.message}>"


@dataclass(frozen=True, slots=True)
class KeptColumns:
    """Columns of the data that are kept beside the prompts, because something else than the loss reads them (rewards)."""

    required: tuple[str, ...] = ()
    """A row without one of these is a bad row."""
    optional: tuple[str, ...] = ()
    """Kept where a row has them."""
    keeps_all: bool = False
    """Whether all columns are kept, since a reward function takes whatever there is (`**kwargs`)."""

    def values_of(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """The values of a row that are kept for rewards, by column; optional ones that are null or missing are left out.

        `ground_truth` is also taken from inside the column `reward_model`, where verl's data sets have it. Raises RowError:
        missing_reward_column for a required one that is null or missing, or the refusal of a value that could not be read.
        """
        names = list(fields) if self.keeps_all else [*self.required, *self.optional]
        kept_values = {name: fields[name] for name in names if fields.get(name) is not None}
        verl_column = fields.get("reward_model")  # such as {"ground_truth": "42", ...}
        needs_ground_truth = "ground_truth" in names and "ground_truth" not in kept_values
        if needs_ground_truth and isinstance(verl_column, dict) and "ground_truth" in verl_column:
            kept_values["ground_truth"] = verl_column["ground_truth"]
        for name in self.required:
            if name not in kept_values:
                raise RowError(
                    "missing_reward_column", f"no column {name!r}, which a reward needs; the row has {sorted(fields)}"
                )
        for name, value in kept_values.items():
            if isinstance(value, UnreadableValue):
                raise RowError(value.reason, f'column "{name}": {value.message}')
        return kept_values


class RowError(Exception):
    """Why a row is no document: a reason code to count by, and a message with the value and the constraint."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message


def show_value(value: Any) -> str:
    """A value of a row as error messages show it, shortened."""
    return value.message if isinstance(value, UnreadableValue) else _SHORT_REPR.repr(value)


def value_at(fields: dict[str, Any], column: str) -> Any:
    """Find the value of a column in a row. `a.b` is `b` inside the column `a`, and `a.0` the first element of the list in `a`.

    `fields`: the row's values by column. Raises KeyError if there is no such value. A value that could not be read is an
    `UnreadableValue`, which says why; RowError for a value inside of one.
    """
    # A column that is itself called `a.b` goes first.
    path = [column] if column in fields else column.split(".")
    node: Any = fields
    for key in path:
        is_index = key.isdecimal() and key.isascii()
        if isinstance(node, list) and is_index and int(key) < len(node):
            node = node[int(key)]
        elif isinstance(node, dict) and key in node:
            node = node[key]
        elif isinstance(node, UnreadableValue):
            raise RowError(node.reason, f'column "{column}": {node.message}')
        else:
            raise KeyError(column)
    return node


def parse_group(fields: dict[str, Any], column: str) -> str:
    """Read the group that a row belongs to (`data.group_by`), as text: " a " -> "a", 7 -> "7", 7.0 -> "7".

    Rows of one group stay on one side of a split. Raises RowError (missing_group) if the column is missing, or holds neither a
    text nor a whole number.
    """
    try:
        group = value_at(fields, column)
    except KeyError:
        message = f"no column {column!r} (data.group_by); the row has {sorted(fields)}"
        raise RowError("missing_group", message) from None
    if isinstance(group, str) and group.strip():
        return group.strip()
    is_int = isinstance(group, int) and not isinstance(group, bool)
    # Tables turn whole numbers into floats if a cell of the column is empty.
    is_whole_float = isinstance(group, float) and group.is_integer()
    if is_int or is_whole_float:
        return str(int(group))
    raise RowError(
        "missing_group", f'"{column}" (data.group_by) is {show_value(group)}; it must be a text or a whole number'
    )


def is_blank_value(value: Any) -> bool:
    """Whether a value of a row says nothing, however tables and files write that: None, "", "null", "[]", [None], {"a": ""}."""
    if isinstance(value, str):
        return value.strip() in ("", "[]", "{}", "null")
    if isinstance(value, dict):
        return all(map(is_blank_value, value.values()))
    if isinstance(value, list):
        return all(map(is_blank_value, value))
    return value is None


def is_list_of_texts(value: Any) -> bool:
    """Whether a value is a list of one or more texts. Some tables keep their only text in a list."""
    return isinstance(value, list) and bool(value) and all(isinstance(element, str) for element in value)


def parse_text(fields: dict[str, Any], column: str, shown_name: str | None = None) -> str:
    """Read the text in a column of a row, or the only text of the list in it. Raises RowError: not_text, empty_text.

    `shown_name`: what error messages call the text, such as `messages[2].content`; by default the column in quotes. A list of
    several texts, or of none, is no text. (Of several, `data.columns` can choose one: `answers.0`.) `fields`: the row's values by
    column.
    """
    value: Any = fields.get(column)
    name = shown_name or f'"{column}"'
    if is_list_of_texts(value):
        if len(value) > 1:
            # Only a column has a setting that can choose one of its texts: `answers.0` is the first one of `answers`.
            advice = "" if shown_name else f", or choose one with data.columns.{column}={column}.0"
            raise RowError(
                "not_text",
                f"{name} is a list of {len(value)} texts, {show_value(value)}, but must be one text: join them{advice}",
            )
        value = value[0]
    if not isinstance(value, str):
        shown_value = show_value(value) if column in fields else "missing"
        correction = f', as "{value}"' if type(value) in (int, float) else ""
        raise RowError("not_text", f"{name} is {shown_value}; it must be a text{correction}")
    if not value or value.isspace():
        raise RowError("empty_text", f"{name} is an empty text")
    return value


def parse_label(label: Any) -> str:
    """Read a class label as text: "a" -> "a", 3 -> "3", 3.0 -> "3", True -> "true". Raises RowError (bad_label) for others."""
    if isinstance(label, bool):
        return "true" if label else "false"
    if isinstance(label, str) and label.strip():
        return label.strip()
    if isinstance(label, int) or (isinstance(label, float) and label.is_integer()):
        return str(int(label))
    raise RowError("bad_label", f'"label" is {show_value(label)}; it must be a name, a whole number or true/false')


def parse_verdict(value: Any) -> bool | None:
    """Read a verdict on an answer, thumbs up (True) or down (False): "Yes" -> True, 0 -> False. None if it is none.

    A table with an empty cell makes 1.0 and 0.0 of its 1 and 0, so that these count too.
    """
    if not isinstance(value, bool | str | int | float):
        return None
    text = str(value).strip().lower()
    return _SURE_VERDICT_BY_TEXT.get(text, _POSSIBLE_VERDICT_BY_TEXT.get(text))


def is_surely_verdict(value: Any) -> bool:
    """Whether a value tells by itself that its column holds verdicts on answers (up, true, 1).

    `yes` or 1.0 may be a class label too.
    """
    return isinstance(value, bool | str | int) and str(value).strip().lower() in _SURE_VERDICT_BY_TEXT


MEDIA_KEYS = ("image", "images", "video", "videos", "audio", "audios")
"""Columns, and keys of turns, that hold something else than text."""
_CONVERSATION_COLUMNS = ("history", "tool_calls", "reasoning_content", "thinking")
_PASSAGE_COLUMNS = ("passage", "context")
MEANINGFUL_COLUMNS: dict[DataFormat, tuple[str, ...]] = {
    **dict.fromkeys(DataFormat, (*MEDIA_KEYS, *_CONVERSATION_COLUMNS, *_PASSAGE_COLUMNS)),
    **dict.fromkeys((DataFormat.messages, DataFormat.sharegpt), (*MEDIA_KEYS, *_CONVERSATION_COLUMNS)),
    **dict.fromkeys((DataFormat.pair, DataFormat.labelled, DataFormat.text), MEDIA_KEYS),
}
"""Columns that carry meaning beside what a format reads."""
MAX_REMEMBERED_NAMES = 1000
"""Names that are remembered for a source: data that uses values as names of columns must not fill the memory."""
MAX_SHOWN_NAMES = 20
"""Names of columns that the report shows."""


class _UnreadNames(NamedTuple):
    """Columns of a row that are neither read nor ignored."""

    names: list[str]
    meaningful: list[str]
    """Those among them that carry meaning, such as images, and have a value in the row."""


@dataclass(slots=True)
class UnreadColumns:
    """Remembers which columns of a source nothing reads, for the report, and rejects rows where such a column carries meaning.

    `names` grows in order of appearance; the caller may clear it.
    """

    meaningful: Collection[str]
    """Columns for which a row is rejected unless they are read, ignored or empty."""
    ignored: Collection[str]
    setting: str
    """The setting that renames columns, for messages."""
    names: dict[str, None] = field(default_factory=dict)
    _unread_names_by_columns: dict[tuple[Any, ...], _UnreadNames] = field(default_factory=dict)
    """What `_unread_names` returned for rows with the same columns."""

    def add_from_row(
        self, fields: Mapping[str, Any], unloaded_columns: tuple[str, ...], read_columns: tuple[str, ...]
    ) -> None:
        """Add the columns of a row that nothing reads to `names`. Raises RowError for one that carries meaning and is not empty.

        A picture or a tool call that the model never sees changes what the answer means. `unloaded_columns`: further columns of
        the file, whose values were not read. `read_columns`: those that are read.
        """
        unread = self._unread_names(fields, unloaded_columns, read_columns)
        for name in unread.meaningful:
            if not is_blank_value(fields[name]):
                raise RowError(
                    f"unread_{name}",
                    f'column "{name}" would be ignored, but it looks important ({show_value(fields[name])}): map it with '
                    f"{self.setting}, or set data.ignore_columns=[{name}] to train without it",
                )
        if len(self.names) < MAX_REMEMBERED_NAMES:
            self.names.update(dict.fromkeys(unread.names))

    def _unread_names(
        self, fields: Mapping[str, Any], unloaded_columns: tuple[str, ...], read_columns: tuple[str, ...]
    ) -> _UnreadNames:
        """Find the columns of a row that nothing reads and that are not ignored; the parameters are as in `add_from_row`.

        It depends on the names of the columns alone. Most rows of a source have the same columns, so the answer is remembered.
        """
        all_columns = (read_columns, unloaded_columns, *fields)
        remembered = self._unread_names_by_columns.get(all_columns)
        if remembered is not None:
            return remembered
        names = []
        for name in (*fields, *unloaded_columns):
            if name not in read_columns and name not in self.ignored:
                names.append(name)
        unread = _UnreadNames(names, [name for name in self.meaningful if name in names and name in fields])
        if len(self._unread_names_by_columns) < MAX_REMEMBERED_NAMES:
            self._unread_names_by_columns[all_columns] = unread
        return unread


def shorten_name_list(names: Collection[str]) -> list[str]:
    """The first `MAX_SHOWN_NAMES` names, and as last entry how many more there are: ["a", ..., "and 7 more"]."""
    first_names = list(names)[:MAX_SHOWN_NAMES]
    num_more = len(names) - MAX_SHOWN_NAMES
    if num_more > 0:
        at_least = "+" if len(names) >= MAX_REMEMBERED_NAMES else ""  # no more were remembered
        first_names.append(f"and {num_more}{at_least} more")
    return first_names

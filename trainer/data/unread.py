"""Columns that a format does not read: each is named once a source, and refused where it carries meaning.

A picture, an earlier turn or a thought that the model would never see changes what its answers mean. Such a column is read
under another name (`data.columns`) or knowingly left out (`data.ignore_columns`); both are for a person to say.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from trainer.data.config import DataFormat
from trainer.data.fields import Refusal, is_nothing, shown
from trainer.data.turns import MEDIA

_TALK = ("history", "tool_calls", "reasoning_content", "thinking")
_BESIDE = ("passage", "context")
_TURNS, _ASKED = (*MEDIA, *_TALK), (*MEDIA, *_TALK, *_BESIDE)
CARRIERS: dict[DataFormat, tuple[str, ...]] = {
    DataFormat.messages: _TURNS,
    DataFormat.sharegpt: _TURNS,
    DataFormat.alpaca: _ASKED,
    DataFormat.prompt_completion: _ASKED,
    DataFormat.preference: _ASKED,
    DataFormat.thumbs: _ASKED,
    DataFormat.pair: MEDIA,
    DataFormat.labelled: MEDIA,
    DataFormat.text: MEDIA,
}
"""Columns that carry meaning beside what a format reads."""
MOST_NAMES = 1000
"""Names that are remembered for a source: data whose columns are values of their own must not fill the memory."""
SHOWN = 20
"""Names that are shown."""


class Unread:
    """What one reader left unread. `names` grows, in order of appearance; whoever takes them may clear it."""

    def __init__(self, carriers: Collection[str], ignored: Collection[str], setting: str) -> None:
        self.names: dict[str, None] = {}
        self._carriers, self._ignored, self._setting = carriers, ignored, setting
        self._known: dict[tuple[Any, ...], tuple[list[str], list[str]]] = {}

    def note(self, fields: Mapping[str, Any], others: tuple[str, ...], read: tuple[str, ...]) -> None:
        """Take in a row of which the columns `read` are read. Raises Refusal for a column that carries meaning."""
        shape = (read, others, *fields)
        found = self._known.get(shape)
        if found is None:
            names = [name for name in (*fields, *others) if name not in read and name not in self._ignored]
            found = names, [name for name in self._carriers if name in names and name in fields]
            if len(self._known) < MOST_NAMES:
                self._known[shape] = found
        names, carriers = found
        for name in carriers:
            if not is_nothing(fields[name]):
                raise Refusal(
                    f"unread_{name}",
                    f'column "{name}" is not read, and it carries meaning ({shown(fields[name])}): rename it with '
                    f"{self._setting} if it is what is to be read, or name it in data.ignore_columns to train without it",
                )
        if len(self.names) < MOST_NAMES:
            self.names.update(dict.fromkeys(names))


def shown_names(names: Collection[str]) -> list[str]:
    """The first names, and how many there are besides."""
    more = len(names) - SHOWN
    return [*list(names)[:SHOWN], *([f"and {more}{'' if len(names) < MOST_NAMES else '+'} more"] if more > 0 else [])]

"""`shardtune prepare --print`: look at prepared data, sequence by sequence, with what is learned of each."""

from __future__ import annotations

import difflib
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.config.help_text import show_help
from strategies.errors import ConfigError

if TYPE_CHECKING:
    from trainer.data.report.inspection import Entry

MOST_ROWS = 1000
"""Samples of one call."""
USAGE = """usage: shardtune prepare --print <directory> [key=value ...]
       shardtune prepare --print [key=value ...] <words of a run>

  shardtune prepare --print runs/first random=3 documents=true
  shardtune prepare --print runs/first find=consultant

Splits, lengths and samples of what `prepare` made: the directory it printed, one of the splits in it, or a run. With the
words of a run instead, the data is prepared first where it is not there. Learned text is green, or between ⟦ and ⟧.

  split=train         the split to look at
  rows=[0,5,10-12]    sequences to decode, counted from 0
  random=3 seed=0     so many drawn without repeats
  find=text limit=5   those whose document holds the text, in any case; how many are shown
  documents=true      the document beside each sequence
  histogram=true      the lengths even where sequences are decoded
  lines=40            longest sample in lines; its middle is left out
  tokenizer=<dir>     the tokenizer to decode with; default: the one recorded"""


@dataclass(slots=True)
class PrintRequest:
    """What is to be shown, as the words say."""

    split: str | None = None
    rows: str | None = None
    random: int | None = None
    find: str | None = None
    seed: int = 0
    limit: int = 5
    documents: bool = False
    histogram: bool = False
    lines: int = 40
    tokenizer: str | None = None


LEAST = {"random": 1, "limit": 1, "lines": 2, "seed": 0}
FLAGS = {"true": True, "false": False}


def read_words(words: list[str]) -> tuple[PrintRequest, list[str]]:
    """(what is asked for, the words that say of which data). Raises ConfigError with every problem."""
    asked, others, problems = PrintRequest(), list[str](), list[str]()
    keys = {field.name: field.type for field in fields(PrintRequest)}
    for word in words:
        key, assigned, value = word.partition("=")
        if not assigned or key not in keys:
            others.append(word)
        elif "bool" in str(keys[key]):
            if value in FLAGS:
                setattr(asked, key, FLAGS[value])
            else:
                problems.append(f"{word}: must be true or false")
        elif key in LEAST:
            if value.isascii() and value.isdigit() and len(value) < 16 and int(value) >= LEAST[key]:
                setattr(asked, key, int(value))
            else:
                problems.append(f"{word}: must be a whole number, at least {LEAST[key]}")
        else:
            setattr(asked, key, value)
    if asked.find == "":
        problems.append("find=: needs some text to look for")
    which = [key for key in ("rows", "random", "find") if getattr(asked, key) is not None]
    if len(which) > 1:
        problems.append(f"{' and '.join(f'{key}=' for key in which)}: give one of them")
    if problems:
        raise ConfigError(problems)
    return asked, others


def directory_of(words: list[str]) -> Path | None:
    """The one directory that `words` name; None where they are those of a run. Raises ConfigError for a mixture."""
    bare = [word for word in words if not word.endswith(".yaml") and ("=" not in word or Path(word).is_dir())]
    if len(bare) == len(words) == 1 and not bare[0].startswith("-"):
        return Path(bare[0]).expanduser()
    if bare:
        known = [field.name for field in fields(PrintRequest)]
        problems = []
        for word in words[1:] if words[0] in bare else words:
            near = difflib.get_close_matches(word.partition("=")[0], known, n=1)
            problems.append(
                f"{word}: no such word beside a directory; "
                + (f"did you mean {near[0]}=?" if near else f"one of {', '.join(known)}")
            )
        raise ConfigError(problems)
    return None


def main(argv: list[str], prepare: Callable[[list[str]], Path]) -> int:
    """Print what the words ask for; returns the exit code. `prepare` makes the data of a run's words.

    Errors: ConfigError, DataError.
    """
    if {"-h", "--help"} & set(argv) or not argv:
        show_help(USAGE)
        return 0 if argv else 64
    asked, others = read_words(argv)
    directory = directory_of(others)
    return show(directory if directory is not None else prepare(others), asked)


def show(directory: Path, asked: PrintRequest) -> int:
    """Print what is asked for; nothing is printed before all of it is known to be possible."""
    from rich.console import Console
    from rich.text import Text

    from trainer.data.report import inspection
    from trainer.data.report.inspection import load_tokenizer, locate

    prepared = locate(directory)
    split = asked.split or prepared.asked or next(iter(prepared.splits))
    rows, found = _chosen(prepared, split, asked)
    tokenizer = load_tokenizer(prepared, asked.tokenizer) if rows else None
    columns = None if sys.stdout.isatty() else shutil.get_terminal_size((100, 24)).columns
    console = Console(markup=False, emoji=False, highlight=False, width=columns)
    console.print(Text(str(prepared.directory)), soft_wrap=True)
    if tokenizer is None or asked.histogram:
        console.print(inspection.splits_table(prepared))
        if (groups := inspection.groups_table(prepared, split)) is not None:
            console.print(groups)
        if asked.find is None:
            console.print(inspection.histogram(prepared, split, min(console.width, 100)))
    if found is not None:
        more = f", the first {len(rows)} shown; limit= shows more" if found > len(rows) else ""
        console.print(f"{found:,} of {len(prepared.split(split)):,} sequences of {split} hold it{more}")
    for index in rows if tokenizer is not None else ():
        _sample(prepared, split, index, tokenizer, console, asked)
    if tokenizer is None and found is None:
        console.print("\nsamples: rows=[0,1]  random=3  find=text; with documents=true the rows beside them")
    return 0


def _sample(prepared: Entry, split: str, index: int, tokenizer: Any, console: Any, asked: PrintRequest) -> None:
    from trainer.data.report import inspection

    console.print(
        inspection.sample(prepared, split, index, tokenizer, console, document=asked.documents, max_lines=asked.lines)
    )


def _chosen(prepared: Entry, split: str, asked: PrintRequest) -> tuple[list[int], int | None]:
    """The sequences to decode; and for find= how many there are in all."""
    from trainer.data.report.inspection import find

    data = prepared.split(split)
    if asked.rows is not None:
        return parse_rows(asked.rows, len(data), split), None
    if asked.random is not None:
        import numpy as np

        number = min(asked.random, len(data), MOST_ROWS)
        return sorted(np.random.default_rng(asked.seed).choice(len(data), number, replace=False).tolist()), None
    if asked.find is not None:
        found = find(prepared, split, asked.find)
        return found[: asked.limit].tolist(), len(found)
    return ([0] if asked.documents and len(data) else []), None


def parse_rows(words: str, length: int, split: str) -> list[int]:
    """`[0,5,10-12]` as numbers below `length`. Raises ConfigError that names every word that cannot be used."""
    rows, problems = list[int](), list[str]()
    for word in words.removeprefix("[").removesuffix("]").split(","):
        first, dash, last = word.strip().partition("-")
        ends = (first, last if dash else first)
        if not all(end.isascii() and end.isdigit() and len(end) < 16 for end in ends):
            problems.append(
                f"rows={word.strip() or 'nothing'}: must be a number or a range such as 3-7, counted from 0"
            )
        elif int(ends[0]) > int(ends[1]) or int(ends[1]) >= length:
            problems.append(f"rows={word.strip()}: {split} has {length:,} sequences, numbered from 0 to {length - 1:,}")
        elif len(rows) + int(ends[1]) - int(ends[0]) >= MOST_ROWS:
            problems.append(f"rows={word.strip()}: at most {MOST_ROWS} sequences in one call")
        else:
            rows += range(int(ends[0]), int(ends[1]) + 1)
    if problems:
        raise ConfigError(problems)
    return rows

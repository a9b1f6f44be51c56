"""`shardtune data`: look at prepared data.

    shardtune data inspect DIR [--split train] [--rows 0,5,10-12 | --random 3 [--seed 0] | --find TEXT [--limit 5]]
                               [--documents] [--histogram] [--lines 40] [--tokenizer DIR]

DIR is what `shardtune prepare` printed, one of the splits in it, or a run directory.
"""

from __future__ import annotations

import argparse
import difflib
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from strategies.errors import ConfigError

if TYPE_CHECKING:
    from trainer.data.report.inspection import Entry

WORDS = ("inspect",)
MOST_ROWS = 1000
"""Samples of one call."""


class _Parser(argparse.ArgumentParser):
    """Refuses with ConfigError, as every other verb does."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{self.prog}: {message}; {self.prog} --help lists the options")


def main(argv: list[str]) -> int:
    """Run the verb; returns the exit code. Errors: ConfigError, DataError."""
    word = argv[0] if argv else "--help"
    if word in ("-h", "--help", "help"):
        print(__doc__)
        return 0
    if word not in WORDS:
        near = difflib.get_close_matches(word, WORDS, n=1)
        raise ConfigError(f"data {word}: no such word; {f'did you mean {near[0]}?' if near else 'use data inspect'}")
    options = _parser()
    if {"-h", "--help"} & set(argv[1:]):
        options.print_help()
        return 0
    return show(options.parse_args(argv[1:]))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="shardtune data inspect",
        description="Splits, lengths and samples of a prepared data set. Learned text is green, or between ⟦ and ⟧.",
        allow_abbrev=False,
    )
    parser.add_argument("directory", type=Path, help="a prepared data set, one of its splits, or a run directory")
    parser.add_argument("--split", help="the split to look at (default: train)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--rows", metavar="0,5,10-12", help="sequences to decode, counted from 0")
    which.add_argument("--random", type=int, metavar="N", help="decode N sequences drawn without repeats")
    which.add_argument("--find", metavar="TEXT", help="decode the sequences whose document holds TEXT, in any case")
    parser.add_argument("--seed", type=int, default=0, help="seed of --random (default: 0)")
    parser.add_argument("--limit", type=int, default=5, help="sequences shown of those --find finds (default: 5)")
    parser.add_argument("--documents", action="store_true", help="show the document beside each sequence")
    parser.add_argument("--histogram", action="store_true", help="show the lengths even where sequences are decoded")
    parser.add_argument(
        "--lines", type=int, default=40, help="longest sample in lines; its middle is left out (default: 40)"
    )
    parser.add_argument("--tokenizer", metavar="DIR", help="tokenizer to decode with (default: the one recorded)")
    return parser


def show(options: argparse.Namespace) -> int:
    """Print what `options` asks for; nothing is printed before all of it is known to be possible."""
    problems = [
        f"--{name} {value}: must be at least {least}"
        for name, value, least in (
            ("random", options.random, 1),
            ("limit", options.limit, 1),
            ("lines", options.lines, 2),
            ("seed", options.seed, 0),
        )
        if value is not None and value < least
    ]
    if options.find == "":
        problems.append("--find: needs some text to look for")
    if problems:
        raise ConfigError(problems)
    from rich.console import Console
    from rich.text import Text

    from trainer.data.report import inspection
    from trainer.data.report.inspection import load_tokenizer, locate

    prepared = locate(options.directory)
    split = options.split or prepared.asked or next(iter(prepared.splits))
    rows, found = _chosen(prepared, split, options)
    tokenizer = load_tokenizer(prepared, options.tokenizer) if rows else None
    columns = None if sys.stdout.isatty() else shutil.get_terminal_size((100, 24)).columns
    console = Console(markup=False, emoji=False, highlight=False, width=columns)
    console.print(Text(str(prepared.directory)), soft_wrap=True)
    if tokenizer is None or options.histogram:
        console.print(inspection.splits_table(prepared))
        if (groups := inspection.groups_table(prepared, split)) is not None:
            console.print(groups)
        if options.find is None:
            console.print(inspection.histogram(prepared, split, min(console.width, 100)))
    if found is not None:
        more = f", the first {len(rows)} shown; --limit shows more" if found > len(rows) else ""
        console.print(f"{found:,} of {len(prepared.split(split)):,} sequences of {split} hold it{more}")
    for index in rows if tokenizer is not None else ():
        shown = inspection.sample(
            prepared, split, index, tokenizer, console, document=options.documents, max_lines=options.lines
        )
        console.print(shown)
    if tokenizer is None and found is None:
        console.print("\nsamples: --rows 0,1  --random 3  --find TEXT; with --documents the rows beside them")
    return 0


def _chosen(prepared: Entry, split: str, options: argparse.Namespace) -> tuple[list[int], int | None]:
    """The sequences to decode; and for --find how many there are in all."""
    from trainer.data.report.inspection import find

    data = prepared.split(split)
    if options.rows is not None:
        return parse_rows(options.rows, len(data), split), None
    if options.random is not None:
        import numpy as np

        number = min(options.random, len(data), MOST_ROWS)
        return sorted(np.random.default_rng(options.seed).choice(len(data), number, replace=False).tolist()), None
    if options.find is not None:
        found = find(prepared, split, options.find)
        return found[: options.limit].tolist(), len(found)
    return ([0] if options.documents and len(data) else []), None


def parse_rows(words: str, length: int, split: str) -> list[int]:
    """`0,5,10-12` as numbers below `length`. Raises ConfigError that names every word that cannot be used."""
    rows, problems = list[int](), list[str]()
    for word in words.split(","):
        first, dash, last = word.strip().partition("-")
        ends = (first, last if dash else first)
        if not all(end.isascii() and end.isdigit() and len(end) < 16 for end in ends):
            problems.append(
                f"--rows {word.strip() or 'nothing'}: must be a number or a range such as 3-7, counted from 0"
            )
        elif int(ends[0]) > int(ends[1]) or int(ends[1]) >= length:
            problems.append(
                f"--rows {word.strip()}: {split} has {length:,} sequences, numbered from 0 to {length - 1:,}"
            )
        elif len(rows) + int(ends[1]) - int(ends[0]) >= MOST_ROWS:
            problems.append(f"--rows {word.strip()}: at most {MOST_ROWS} sequences in one call")
        else:
            rows += range(int(ends[0]), int(ends[1]) + 1)
    if problems:
        raise ConfigError(problems)
    return rows

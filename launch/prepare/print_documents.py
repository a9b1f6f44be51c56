"""`shardtune prepare --print`: shows prepared sequences one by one, with the tokens that are learned."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.config.help_text import show_help
from launch.config.verb_words import (
    VerbWords,
    asks_for_help,
    did_you_mean,
    help_rows,
    read_words,
    setting_words,
    specs,
    word,
)
from strategies.errors import ConfigError, DataError
from trainer.reporting.run_record import RUN_RECORD, read_run_record

if TYPE_CHECKING:
    from trainer.data.report.inspection import PreparedEntry

MOST_ROWS = 1000
"""Samples of one call."""


@dataclass(kw_only=True)
class PrintWords(VerbWords):
    """What `shardtune prepare --print` takes."""

    split: str | None = word("the split to show", like="train")
    rows: str | None = word("sequences to decode, counted from 0", like="[0,5,10-12]")
    random: int | None = word("show this many sequences, drawn at random without repeats", like="3", least=1)
    seed: int = word("seed of random=", default=0, least=0)
    find: str | None = word("sequences whose document contains this text, upper or lower case", like="text")
    limit: int = word("how many matches of find= to show", default=5, least=1)
    documents: bool = word("also show the document of each sequence", default=False, like="true")
    histogram: bool = word("show the lengths also when sequences are decoded", default=False, like="true")
    lines: int = word("most lines of a sample; the middle of a longer one is left out", default=40, least=2)
    tokenizer: str | None = word("the tokenizer to decode with; default: the one that prepared the data", like="<dir>")
    data: list[str] = setting_words(and_flags=True)
    """What says of which data: a directory, or the words of a run."""


USAGE = f"""usage: shardtune prepare --print <directory> [key=value ...]
       shardtune prepare --print [key=value ...] <words of a run>

  shardtune prepare --print runs/first random=3 documents=true
  shardtune prepare --print runs/first find=consultant

prepare --print shows the splits, the lengths and samples of prepared data. Name the directory that `prepare` printed,
one of the splits in it, or a run. You can also type the words of a run: if its data is not prepared yet, that is done
first. Text that the model learns is green, or stands between ⟦ and ⟧.

{help_rows(PrintWords)}"""


def print_words(argv: list[str]) -> PrintWords:
    """What was typed. Errors: ConfigError with every problem."""
    words, problems = read_words("prepare --print", PrintWords, argv)
    chosen = [key for key in ("rows", "random", "find") if key in words.typed]
    if len(chosen) > 1:
        problems.append(f"{' and '.join(f'{key}=' for key in chosen)}: give one of them")
    if problems:
        raise ConfigError(problems)
    return words


def directory_of(words: list[str]) -> Path | None:
    """The one directory that `words` name; None where they are those of a run. Raises ConfigError for a mixture."""
    bare = [each for each in words if not each.endswith(".yaml") and ("=" not in each or Path(each).is_dir())]
    if len(bare) == len(words) == 1 and not bare[0].startswith("-"):
        return Path(bare[0]).expanduser()
    if bare:
        known = [spec.key for spec in specs(PrintWords).values() if spec.kind == "word"]
        others = words[1:] if words[0] in bare else words
        raise ConfigError(
            [
                f"{each}: no such word beside a directory"
                + (did_you_mean(each.partition("=")[0], known, end="=") or f"; one of {', '.join(known)}")
                for each in others
            ]
        )
    return None


def main(argv: list[str], prepare: Callable[[list[str]], Path]) -> int:
    """Print what the words ask for; returns the exit code. `prepare` makes the data of a run's words.

    Errors: ConfigError, DataError.
    """
    if asks_for_help(argv) or not argv:
        show_help(USAGE)
        return 0 if argv else 64
    words = print_words(argv)
    directory = directory_of(words.data)
    return show(directory if directory is not None else prepare(words.data), words)


def show(directory: Path, asked: PrintWords) -> int:
    """Print what is asked for; nothing is printed before all of it is known to be possible."""
    from rich.console import Console
    from rich.text import Text

    from trainer.data.report import inspection
    from trainer.data.report.inspection import load_tokenizer, locate

    if (directory / RUN_RECORD).is_file():
        directory = data_directory_of(directory)
    prepared = locate(directory)
    split = asked.split or prepared.requested_split or next(iter(prepared.splits))
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
            console.print(inspection.length_histogram(prepared, split, min(console.width, 100)))
    if found is not None:
        more = f", the first {len(rows)} shown; limit= shows more" if found > len(rows) else ""
        console.print(f"{found:,} of {len(prepared.split(split)):,} sequences of {split} hold it{more}")
    for index in rows if tokenizer is not None else ():
        _sample(prepared, split, index, tokenizer, console, asked)
    if tokenizer is None and found is None:
        console.print("\nsamples: rows=[0,1]  random=3  find=text; with documents=true the rows beside them")
    return 0


def data_directory_of(run_dir: Path) -> Path:
    """The prepared data of a run. A relative path counts from the working directory, else from the run.

    Errors: ConfigError if it is not there, DataError if the run's record cannot be read.
    """
    try:
        named = read_run_record(run_dir).data_directory
    except (OSError, ValueError, RecursionError) as error:
        path = run_dir / RUN_RECORD
        raise DataError(f"{path}: cannot be read ({error}); name the directory of the prepared data") from error
    if not named:
        raise ConfigError(
            f"{run_dir / RUN_RECORD}: does not say where the data of the run is; name its prepared directory"
        )
    for directory in (Path(named).expanduser(), run_dir / named):
        if (directory / "manifest.json").is_file():
            return directory
    raise ConfigError(
        f"{named}: the prepared data of {run_dir} is no longer there; prepare it again with shardtune prepare"
    )


def _sample(prepared: PreparedEntry, split: str, index: int, tokenizer: Any, console: Any, asked: PrintWords) -> None:
    from trainer.data.report import inspection

    console.print(
        inspection.render_sample(
            prepared, split, index, tokenizer, console, document=asked.documents, max_lines=asked.lines
        )
    )


def _chosen(prepared: PreparedEntry, split: str, asked: PrintWords) -> tuple[list[int], int | None]:
    """The sequences to decode; and for find= how many there are in all."""
    from trainer.data.report.inspection import find_sequences

    data = prepared.split(split)
    if asked.rows is not None:
        return parse_rows(asked.rows, len(data), split), None
    if asked.random is not None:
        import numpy as np

        number = min(asked.random, len(data), MOST_ROWS)
        return sorted(np.random.default_rng(asked.seed).choice(len(data), number, replace=False).tolist()), None
    if asked.find is not None:
        found = find_sequences(prepared, split, asked.find)
        return found[: asked.limit].tolist(), len(found)
    return ([0] if asked.documents and len(data) else []), None


def parse_rows(words: str, length: int, split: str) -> list[int]:
    """`[0,5,10-12]` as numbers below `length`. Raises ConfigError that names every word that cannot be used."""
    rows: list[int] = []
    problems: list[str] = []
    for entry in words.removeprefix("[").removesuffix("]").split(","):
        shown = entry.strip()
        first, dash, last = shown.partition("-")
        ends = (first, last if dash else first)
        if not all(end.isascii() and end.isdigit() and len(end) < 16 for end in ends):
            problems.append(f"rows={shown or 'nothing'}: must be a number or a range such as 3-7, counted from 0")
        elif int(ends[0]) > int(ends[1]) or int(ends[1]) >= length:
            problems.append(f"rows={shown}: {split} has {length:,} sequences, numbered from 0 to {length - 1:,}")
        elif len(rows) + int(ends[1]) - int(ends[0]) >= MOST_ROWS:
            problems.append(f"rows={shown}: at most {MOST_ROWS} sequences in one call")
        else:
            rows += range(int(ends[0]), int(ends[1]) + 1)
    if problems:
        raise ConfigError(problems)
    return rows

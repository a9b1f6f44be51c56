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
    selections = [f"{key}=" for key in ("rows", "random", "find") if key in words.typed]
    if len(selections) > 1:
        problems.append(f"{' and '.join(selections)}: give one of them")
    if problems:
        raise ConfigError(problems)
    return words


def directory_of(words: list[str]) -> Path | None:
    """The one directory that `words` name; None if they are those of a run. Errors: ConfigError for a mixture."""
    bare_words = [word for word in words if not word.endswith(".yaml") and ("=" not in word or Path(word).is_dir())]
    if len(bare_words) == len(words) == 1 and not bare_words[0].startswith("-"):
        return Path(bare_words[0]).expanduser()
    if not bare_words:
        return None
    keys = [spec.key for spec in specs(PrintWords).values() if spec.kind == "word"]
    problems = []
    # If the first word is the directory, the others are wrong beside it.
    for argument in words[1:] if words[0] in bare_words else words:
        hint = did_you_mean(argument.partition("=")[0], keys, end="=") or f"; one of {', '.join(keys)}"
        problems.append(f"{argument}: no such word beside a directory{hint}")
    raise ConfigError(problems)


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


def show(directory: Path, words: PrintWords) -> int:
    """Print what the words name. Nothing is printed before all of it is known to be possible. Returns the exit code."""
    from rich.console import Console
    from rich.text import Text

    from trainer.data.report import inspection
    from trainer.data.report.inspection import load_tokenizer, locate

    if (directory / RUN_RECORD).is_file():
        directory = data_directory_of(directory)
    prepared = locate(directory)
    split = words.split or prepared.requested_split or next(iter(prepared.splits))
    rows, matches = _rows_to_show(prepared, split, words)
    tokenizer = load_tokenizer(prepared, words.tokenizer) if rows else None
    columns = None if sys.stdout.isatty() else shutil.get_terminal_size((100, 24)).columns
    console = Console(markup=False, emoji=False, highlight=False, width=columns)
    console.print(Text(str(prepared.directory)), soft_wrap=True)
    if tokenizer is None or words.histogram:
        console.print(inspection.splits_table(prepared))
        groups = inspection.groups_table(prepared, split)
        if groups is not None:
            console.print(groups)
        if words.find is None:
            console.print(inspection.length_histogram(prepared, split, min(console.width, 100)))
    if matches is not None:
        more = f", the first {len(rows)} shown; limit= shows more" if matches > len(rows) else ""
        console.print(f"{matches:,} of {len(prepared.split(split)):,} sequences of {split} hold it{more}")
    if tokenizer is not None:
        for index in rows:
            _print_sample(prepared, split, index, tokenizer, console, words)
    elif matches is None:
        console.print("\nsamples: rows=[0,1]  random=3  find=text; with documents=true the rows beside them")
    return 0


def data_directory_of(run_dir: Path) -> Path:
    """The prepared data of a run. A relative path counts from the working directory, else from the run.

    Errors: ConfigError if it is not there, DataError if the run's record cannot be read.
    """
    try:
        recorded = read_run_record(run_dir).data_directory
    except (OSError, ValueError, RecursionError) as error:
        path = run_dir / RUN_RECORD
        raise DataError(f"{path}: cannot be read ({error}); name the directory of the prepared data") from error
    if not recorded:
        raise ConfigError(
            f"{run_dir / RUN_RECORD}: does not say where the data of the run is; name its prepared directory"
        )
    for directory in (Path(recorded).expanduser(), run_dir / recorded):
        if (directory / "manifest.json").is_file():
            return directory
    raise ConfigError(
        f"{recorded}: the prepared data of {run_dir} is no longer there; prepare it again with shardtune prepare"
    )


def _print_sample(
    prepared: PreparedEntry, split: str, index: int, tokenizer: Any, console: Any, words: PrintWords
) -> None:
    """Print one decoded sequence, with its document if the words ask for it."""
    from trainer.data.report import inspection

    console.print(
        inspection.render_sample(
            prepared, split, index, tokenizer, console, document=words.documents, max_lines=words.lines
        )
    )


def _rows_to_show(prepared: PreparedEntry, split: str, words: PrintWords) -> tuple[list[int], int | None]:
    """(the sequences to decode, how many match `find=` in all or None)."""
    from trainer.data.report.inspection import find_sequences

    sequences = prepared.split(split)
    if words.rows is not None:
        return parse_rows(words.rows, len(sequences), split), None
    if words.random is not None:
        import numpy as np

        number = min(words.random, len(sequences), MOST_ROWS)
        drawn = np.random.default_rng(words.seed).choice(len(sequences), number, replace=False)
        return sorted(drawn.tolist()), None
    if words.find is not None:
        matches = find_sequences(prepared, split, words.find)
        return matches[: words.limit].tolist(), len(matches)
    if words.documents and len(sequences):
        return [0], None
    return [], None


def parse_rows(words: str, length: int, split: str) -> list[int]:
    """`[0,5,10-12]` as numbers below `length`. Errors: ConfigError that names every entry that cannot be used."""
    rows: list[int] = []
    problems: list[str] = []
    for part in words.removeprefix("[").removesuffix("]").split(","):
        entry = part.strip()
        first_text, dash, last_text = entry.partition("-")
        if not dash:
            last_text = first_text
        if not (_is_row_number(first_text) and _is_row_number(last_text)):
            problems.append(f"rows={entry or 'nothing'}: must be a number or a range such as 3-7, counted from 0")
            continue
        first = int(first_text)
        last = int(last_text)
        if first > last or last >= length:
            problems.append(f"rows={entry}: {split} has {length:,} sequences, numbered from 0 to {length - 1:,}")
        elif len(rows) + last - first >= MOST_ROWS:
            problems.append(f"rows={entry}: at most {MOST_ROWS} sequences in one call")
        else:
            rows += range(first, last + 1)
    if problems:
        raise ConfigError(problems)
    return rows


def _is_row_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 16

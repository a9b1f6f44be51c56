"""`shardtune prepare --print`: shows prepared sequences one by one, with the tokens that are learned."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from launch.config.argument_values import suggestion_of_similar_name
from launch.config.help_text import show_help
from launch.config.verb_arguments import (
    VerbArguments,
    argument_specs,
    asks_for_help,
    forwarded_settings,
    help_rows,
    option,
    read_arguments,
)
from strategies import exit_codes
from strategies.errors import ConfigError, DataError
from trainer.reporting.run_record import RUN_RECORD, read_run_record

if TYPE_CHECKING:
    from rich.console import Console

    from trainer.data.report.inspection import PreparedEntry

MAX_SHOWN_SEQUENCES = 1000
"""Sequences that one call decodes at most."""


@dataclass(kw_only=True)
class PrintArguments(VerbArguments):
    """What `shardtune prepare --print` takes."""

    split: str | None = option("the split to show", example="train")
    rows: str | None = option("sequences to decode, counted from 0", example="[0,5,10-12]")
    random: int | None = option("show this many sequences, drawn at random without repeats", example="3", least=1)
    seed: int = option("seed of random=", default=0, least=0)
    find: str | None = option("sequences whose document contains this text, upper or lower case", example="text")
    limit: int = option("how many matches of find= to show", default=5, least=1)
    documents: bool = option("also show the document of each sequence", default=False, example="true")
    histogram: bool = option("show the lengths also when sequences are decoded", default=False, example="true")
    lines: int = option("most lines of a sample; the middle of a longer one is left out", default=40, least=2)
    tokenizer: str | None = option(
        "the tokenizer to decode with; default: the one that prepared the data", example="<dir>"
    )
    data: list[str] = forwarded_settings(forwards_unknown_flags=True)
    """Which data to show: a directory, or the arguments of a run."""


USAGE = f"""usage: shardtune prepare --print <directory> [key=value ...]
       shardtune prepare --print [key=value ...] <settings of a run>

  shardtune prepare --print runs/first random=3 documents=true
  shardtune prepare --print runs/first find=consultant

prepare --print shows the splits, the lengths and samples of prepared data. Name the directory that `prepare` printed,
one of the splits in it, or a run. You can also type the settings of a run: if its data is not prepared yet, that is done
first. Text that the model learns is green, or stands between ⟦ and ⟧.

{help_rows(PrintArguments)}"""


def read_print_arguments(argv: list[str]) -> PrintArguments:
    """Read the arguments behind `shardtune prepare --print`, of which only one may select sequences.

    Raises ConfigError with every problem.
    """
    arguments, problems = read_arguments("prepare --print", PrintArguments, argv)
    selections = [f"{key}=" for key in ("rows", "random", "find") if key in arguments.text_by_key]
    if len(selections) > 1:
        problems.append(f"{' and '.join(selections)}: give one of them")
    if problems:
        raise ConfigError(problems)
    return arguments


def directory_argument_or_none(arguments: list[str]) -> Path | None:
    """Tell which of two forms the arguments have: returns the directory if they name one, None if they are settings of a run.

    ["runs/first"] -> Path("runs/first"); ["data.path=a.jsonl", "settings.yaml"] -> None. Raises ConfigError for a mixture.
    """
    paths = []
    for argument in arguments:
        is_setting = "=" in argument and not Path(argument).is_dir()  # a directory may have an equals sign in its name
        if not is_setting and not argument.endswith(".yaml"):  # a settings file belongs to a run
            paths.append(argument)
    is_one_path = len(paths) == len(arguments) == 1 and not paths[0].startswith("-")
    if is_one_path:
        return Path(paths[0]).expanduser()
    if not paths:
        return None
    known_keys = [spec.key for spec in argument_specs(PrintArguments).values() if spec.kind == "option"]
    # If the first argument is the directory, the others are wrong beside it; otherwise all are named.
    wrong_arguments = arguments[1:] if arguments[0] in paths else arguments
    problems = []
    for argument in wrong_arguments:
        key = argument.partition("=")[0]
        hint = suggestion_of_similar_name(key, known_keys, end="=") or f"; one of {', '.join(known_keys)}"
        problems.append(f"{argument}: no such argument beside a directory{hint}")
    raise ConfigError(problems)


def main(argv: list[str], prepare: Callable[[list[str]], Path]) -> int:
    """Run `shardtune prepare --print`, which shows prepared sequences; returns the exit code. Raises ConfigError or DataError.

    The data is named by its directory, or by the settings of a run. `prepare`: prepares the data of a run from its
    settings, and returns the directory of the data. It is passed in because its module imports this one.
    """
    if asks_for_help(argv) or not argv:
        show_help(USAGE)
        return 0 if argv else exit_codes.WRONG_SETTING
    arguments = read_print_arguments(argv)
    directory = directory_argument_or_none(arguments.data)
    if directory is None:
        directory = prepare(arguments.data)
    return print_prepared_data(directory, arguments)


def print_prepared_data(directory: Path, arguments: PrintArguments) -> int:
    """Print splits, lengths and decoded sequences of prepared data, as `arguments` says; returns the exit code.

    `directory`: of prepared data, or of a run. Everything that can be refused is looked up before the first line is
    printed. Raises ConfigError for a split or sequence that does not exist.
    """
    from rich.console import Console
    from rich.text import Text

    from trainer.data.report import inspection
    from trainer.data.report.inspection import find_prepared, load_tokenizer

    # Which split, and which of its sequences (`num_matches`: how many contain the text of find=; None without it).
    if (directory / RUN_RECORD).is_file():
        directory = data_directory_of_run(directory)
    prepared = find_prepared(directory)
    split = arguments.split or prepared.requested_split or next(iter(prepared.splits))
    sequence_numbers, num_matches = _sequences_to_show(prepared, split, arguments)
    tokenizer = load_tokenizer(prepared, arguments.tokenizer) if sequence_numbers else None

    # In a pipe, rich would take 80 columns whatever COLUMNS says.
    columns = None if sys.stdout.isatty() else shutil.get_terminal_size((100, 24)).columns
    console = Console(markup=False, emoji=False, highlight=False, width=columns)
    console.print(Text(str(prepared.directory)), soft_wrap=True)
    if tokenizer is None or arguments.histogram:
        _print_overview(console, prepared, split, with_lengths=arguments.find is None)
    if num_matches is not None:
        limit_note = (
            f", the first {len(sequence_numbers)} shown; limit= shows more"
            if num_matches > len(sequence_numbers)
            else ""
        )
        console.print(f"{num_matches:,} of {len(prepared.split(split)):,} sequences of {split} hold it{limit_note}")
    if tokenizer is not None:
        for number in sequence_numbers:
            sample = inspection.render_sample(
                prepared,
                split,
                number,
                tokenizer,
                console,
                show_document=arguments.documents,
                max_lines=arguments.lines,
            )
            console.print(sample)
    elif num_matches is None:
        console.print("\nsamples: rows=[0,1]  random=3  find=text; with documents=true the rows beside them")
    return 0


def _print_overview(console: Console, prepared: PreparedEntry, split: str, *, with_lengths: bool) -> None:
    """Print what the prepared data holds: its splits, and the sources and labels in `split`.

    `with_lengths`: also a histogram of the lengths of the sequences in this split.
    """
    from trainer.data.report import inspection

    console.print(inspection.splits_table(prepared))
    groups = inspection.source_and_label_table(prepared, split)
    if groups is not None:
        console.print(groups)
    if with_lengths:
        console.print(inspection.length_histogram(prepared, split, min(console.width, 100)))


def data_directory_of_run(run_dir: Path) -> Path:
    """Find the prepared data that a run trained on, from its `run.json`.

    A relative path there counts from the working directory or, if nothing is there, from the run directory. Raises
    ConfigError if the data is missing, DataError if the run's record cannot be read.
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


class _SequencesToShow(NamedTuple):
    """Which sequences of a split are decoded."""

    numbers: list[int]
    num_matches: int | None = None
    """How many sequences contain the text of `find=`; None without `find=`."""


def _sequences_to_show(prepared: PreparedEntry, split: str, arguments: PrintArguments) -> _SequencesToShow:
    """Choose which sequences of a split are decoded. The first of these arguments that is set decides:

    - `rows=`: those of these numbers;
    - `random=`: that many, sampled by `seed=`;
    - `find=`: the first `limit=` that contain the text;
    - `documents=true`: the first one;
    - otherwise none.
    """
    from trainer.data.report.inspection import find_sequences

    sequences = prepared.split(split)
    if arguments.rows is not None:
        return _SequencesToShow(parse_sequence_numbers(arguments.rows, len(sequences), split))
    if arguments.random is not None:
        import numpy as np

        num_samples = min(arguments.random, len(sequences), MAX_SHOWN_SEQUENCES)
        sampled = np.random.default_rng(arguments.seed).choice(len(sequences), num_samples, replace=False)
        return _SequencesToShow(sorted(sampled.tolist()))
    if arguments.find is not None:
        matches = find_sequences(prepared, split, arguments.find)
        return _SequencesToShow(matches[: arguments.limit].tolist(), num_matches=len(matches))
    if arguments.documents and len(sequences):
        return _SequencesToShow([0])
    return _SequencesToShow([])


def parse_sequence_numbers(rows_argument: str, num_sequences: int, split: str) -> list[int]:
    """Read the sequence numbers of `rows=`: "[0,5,10-12]" -> [0, 5, 10, 11, 12]. Raises ConfigError that names every wrong entry.

    All must be below `num_sequences`. `split`: the name of the split that has so many sequences, for messages.
    """
    numbers: list[int] = []
    problems: list[str] = []
    for raw_entry in rows_argument.removeprefix("[").removesuffix("]").split(","):
        entry = raw_entry.strip()
        first_text, dash, last_text = entry.partition("-")
        if not dash:
            last_text = first_text
        if not (_is_sequence_number(first_text) and _is_sequence_number(last_text)):
            problems.append(f"rows={entry or 'nothing'}: must be a number or a range such as 3-7, counted from 0")
            continue
        first = int(first_text)
        last = int(last_text)
        if first > last or last >= num_sequences:
            problems.append(
                f"rows={entry}: {split} has {num_sequences:,} sequences, numbered from 0 to {num_sequences - 1:,}"
            )
        elif len(numbers) + last - first >= MAX_SHOWN_SEQUENCES:
            problems.append(f"rows={entry}: at most {MAX_SHOWN_SEQUENCES} sequences in one call")
        else:
            numbers += range(first, last + 1)
    if problems:
        raise ConfigError(problems)
    return numbers


def _is_sequence_number(text: str) -> bool:
    """Whether a text is a number that a sequence may have; one of more than 15 digits is too large for any data."""
    return text.isascii() and text.isdigit() and len(text) < 16

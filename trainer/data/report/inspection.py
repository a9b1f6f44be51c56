"""Shows a prepared data set in the terminal: its splits, the lengths of its sequences, samples beside their documents.

Opens memory-mapped files only, so that it answers at once whatever the size. Text of the data set is printed as it is,
never as markup or as terminal codes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich import box
from rich.bar import Bar
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from strategies.errors import ConfigError, DataError
from trainer.data.read.opening import read_json_object
from trainer.data.report.audit import make_histogram, split_sizes
from trainer.data.report.wording import escape_control_characters
from trainer.data.store.documents import DOCUMENTS_FILE, DocumentTable
from trainer.data.store.sequences import LABEL, TokenDataset
from trainer.pages.numbers import format_percent

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


SPLIT_ORDER = {"train": 0, "eval": 1, "test": 2}
PREPARE_AGAIN = "prepare the data again"


@dataclass(slots=True)
class PreparedEntry:
    """A prepared data set found on disk."""

    directory: Path
    manifest: dict[str, Any]
    splits: dict[str, Path]
    """Directory of each split, train first."""
    requested_split: str | None = None
    """The split that the user's path pointed to."""
    opened: dict[str, TokenDataset] = field(default_factory=dict)

    def split(self, name: str) -> TokenDataset:
        """Open a split, once. Raises ConfigError for an unknown name, DataError for a damaged split."""
        if name not in self.splits:
            raise ConfigError(f"split={name}: there is no such split; one of {', '.join(self.splits)}")
        if name not in self.opened:
            self.opened[name] = TokenDataset.open(self.splits[name])
        return self.opened[name]


def find_prepared(path: Path) -> PreparedEntry:
    """Find the prepared data set at `path`: its directory, or that of one of its splits, which is then the `requested_split`.

    Raises ConfigError if there is none, DataError if a file of it cannot be read.
    """
    path = Path(path).expanduser()
    if not path.is_dir():
        raise ConfigError(f"{path}: there is no such directory; name a prepared data set or a run directory")
    if not (path / "manifest.json").is_file():
        raise ConfigError(
            f"{path}: holds no manifest.json, so it is no prepared data set, and no run.json, so it is no run; "
            "shardtune prepare prints the directory it made"
        )
    # A data set is a directory like this; a split has an index, and its data set's manifest one level up:
    #   manifest.json, tokens.bin, documents.arrow, ...
    #   train/manifest.json, train/index.npy
    #   eval/manifest.json, eval/index.npy
    is_split = (path / "index.npy").is_file() and (path.parent / "manifest.json").is_file()
    if is_split:
        entry = find_prepared(path.parent)
        entry.requested_split = path.name
        return entry
    directories = [directory for directory in path.iterdir() if (directory / "manifest.json").is_file()]
    directories.sort(key=lambda directory: (SPLIT_ORDER.get(directory.name, len(SPLIT_ORDER)), directory.name))
    splits = {directory.name: directory for directory in directories}
    if not splits:  # a store without splits is read as one
        splits = {path.name: path}
    return PreparedEntry(path, read_json_object(path / "manifest.json", PREPARE_AGAIN), splits)


def find_sequences(prepared: PreparedEntry, split: str, text: str) -> np.ndarray:
    """Find the sequences of a split whose document contains `text`, whatever its case: int64, in order.

    Searches the texts and labels of `documents.arrow`, batch by batch. Raises DataError if the data set has no such file.
    """
    path = prepared.directory / DOCUMENTS_FILE
    dataset = prepared.split(split)
    if not path.is_file():
        raise DataError(f"find=: {path} is not there, so texts cannot be searched; {PREPARE_AGAIN}")
    import pyarrow as pa

    matching_documents = [np.zeros(0, np.int64)]
    first_row = 0
    try:
        for batch in pa.ipc.open_stream(pa.memory_map(str(path))):
            matching_documents.append(np.flatnonzero(_rows_that_contain(batch, text)) + first_row)
            first_row += batch.num_rows
    except pa.ArrowException as error:
        raise DataError(f"{path}: cannot be read ({error}); {PREPARE_AGAIN}") from error
    # `documents` has the document of each sequence. A document may be several sequences, and each of them counts as a hit.
    is_match = np.isin(dataset.documents, np.concatenate(matching_documents))
    return np.flatnonzero(is_match).astype(np.int64)


def _rows_that_contain(batch: Any, text: str) -> np.ndarray:
    """Find which documents of an Arrow batch contain `text`, whatever its case, in any of their texts: bool [rows]."""
    import pyarrow.compute as pc

    is_match = np.zeros(batch.num_rows, bool)
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        if name in ("prompt", "completion", "text", "label", "tools"):
            is_match |= _texts_that_contain(pc, column, text)
        elif name in ("messages", "chosen", "rejected"):
            # A list of turns in each row: search the turns of all rows at once, then go back to their rows.
            turns = pc.list_flatten(column)
            row_of_turn = pc.list_parent_indices(column).to_numpy(zero_copy_only=False)
            for key in ("content", "reasoning_content", "tool_calls"):
                is_match[row_of_turn[_texts_that_contain(pc, pc.struct_field(turns, key), text)]] = True
    return is_match


def _texts_that_contain(pc: Any, column: Any, text: str) -> np.ndarray:
    """bool [n]: whether each text of an Arrow column contains `text` in any case; null does not. `pc`: `pyarrow.compute`."""
    return np.asarray(pc.fill_null(pc.match_substring(column, text, ignore_case=True), False))


def load_tokenizer(prepared: PreparedEntry, path: str | None) -> PreTrainedTokenizerBase:
    """Load the tokenizer of the data set, or the one at `path`, to show its sequences as text. Local files only.

    Raises ConfigError if there is none, or if its vocabulary has another size than the data was prepared with.
    """
    recorded = prepared.manifest.get("tokenizer") or {}
    directory = path or recorded.get("path") or recorded.get("name")
    if not directory:
        raise ConfigError("tokenizer=: the data set does not name its tokenizer; give the directory of the model")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
    except Exception as error:
        cause = str(error).strip().split("\n")[0]
        raise ConfigError(
            f"tokenizer={directory}: cannot be loaded ({cause}); give the directory of the model"
        ) from error
    # Of a tokenizer with added tokens, `vocab_size` is the size without them; either may be recorded.
    vocab_size = len(tokenizer)
    recorded_size = recorded.get("vocab_size")
    if recorded_size is not None and recorded_size not in (vocab_size, tokenizer.vocab_size):
        raise ConfigError(
            f"tokenizer={directory}: has {vocab_size} tokens, the data was prepared with one of {recorded_size}; give that one"
        )
    return tokenizer


HISTOGRAM_BINS = 16
MAX_GROUPS = 50
"""Sources and labels that a table lists."""


def splits_table(prepared: PreparedEntry) -> RenderableType:
    """Make a table of the sizes of every split for the terminal, counted from the arrays."""
    table = _empty_table("split", "documents", "sequences", "tokens", "learned", "share", "p50", "p90", "longest")
    for name in prepared.splits:
        sizes = split_sizes(prepared.split(name))
        numbers = [f"{sizes[key]:,}" for key in ("documents", "sequences", "tokens", "supervised_tokens")]
        lengths = [f"{sizes[key]:,}" for key in ("length_p50", "length_p90", "length_max")]
        table.add_row(_plain_text(name), *numbers, format_percent(sizes["supervised_share"]), *lengths)
    return table


def source_and_label_table(prepared: PreparedEntry, split: str) -> RenderableType | None:
    """Make a table of a split's sequences and tokens by source and by label, for the terminal.

    None if there is one source and no label. At most `MAX_GROUPS` rows, and how many more there are.
    """
    dataset = prepared.split(split)
    # (kind, name, bool [N]: which sequences are of it)
    groups: list[tuple[str, str, np.ndarray]] = []
    if len(dataset.source_names) > 1:
        for number, name in enumerate(dataset.source_names):
            groups.append(("source", name, dataset.sources == number))
    if dataset.labels is not None:
        label_names = prepared.manifest.get("label_names")
        if not label_names:  # labels without names are shown as their numbers
            label_names = list(range(int(dataset.labels.max(initial=-1)) + 1))
        for number, name in enumerate(label_names):
            groups.append(("label", str(name), dataset.labels == number))
    if not groups:
        return None
    table = _empty_table("", "name", "sequences", "share", "tokens", title=f"{split}: by source and label")
    for kind, name, is_member in groups[:MAX_GROUPS]:
        num_sequences = int(is_member.sum())
        num_tokens = int(dataset.lengths[is_member].sum())
        share = format_percent(num_sequences / len(dataset))
        table.add_row(kind, _plain_text(name), f"{num_sequences:,}", share, f"{num_tokens:,}")
    if len(groups) > MAX_GROUPS:
        table.add_row("", f"... and {len(groups) - MAX_GROUPS} more", "", "", "")
    return table


def length_histogram(prepared: PreparedEntry, split: str, width: int) -> RenderableType:
    """Draw a histogram of the lengths of a split's sequences in tokens, as bars within `width` columns of the terminal."""
    title = Text(f"{split}: length of sequences in tokens", style="bold")
    histogram = make_histogram(prepared.split(split).lengths, HISTOGRAM_BINS)
    # What each bar is about, such as "128-255", and how many sequences it has.
    ranges: list[str] = []
    for begin, end in pairwise(histogram.edges):
        first = int(begin)
        last = int(end) - 1
        ranges.append(f"{first:,}-{last:,}" if last > first else f"{first:,}")
    counts = [f"{count:,}" for count in histogram.counts]
    largest_count = max(histogram.counts)
    # What the two columns of numbers and the space between leave.
    bar_width = max(width - max(map(len, ranges)) - max(map(len, counts)) - 4, 10)
    grid = Table.grid(padding=(0, 1))
    for justify in ("right", "left", "right"):
        grid.add_column(justify=justify, no_wrap=True)
    for length_range, count, shown_count in zip(ranges, histogram.counts, counts, strict=True):
        # A bar is at least one column wide, so that it can be seen.
        bar_end = max(count, largest_count / bar_width) if count else 0
        grid.add_row(length_range, Bar(largest_count, 0, bar_end, width=bar_width, color="cyan"), shown_count)
    return Group(title, grid)


def render_sample(
    prepared: PreparedEntry,
    split: str,
    index: int,
    tokenizer: PreTrainedTokenizerBase,
    console: Console,
    *,
    show_document: bool = False,
    max_lines: int = 40,
) -> RenderableType:
    """Show sequence `index` of a split: its text below a heading, with what is learned in green, or between ⟦ and ⟧.

    `show_document`: show the document that it was made of, too. `max_lines`: of a longer text, the middle is left out. `console`:
    where it is shown; without colour the brackets are used.
    """
    from trainer.data.report.preview import preview_text  # needs torch and pyarrow, and the sizes of a data set do not

    dataset = prepared.split(split)
    # The heading names where the document comes from, so that its row is read in any case.
    row: dict[str, Any] | None = None
    if (prepared.directory / DOCUMENTS_FILE).is_file():
        row = DocumentTable(prepared.directory).row(int(dataset.documents[index]))
    heading = _sample_heading(prepared, split, index, row)
    colour = console.is_terminal and not console.no_color
    # The text of the sequence, with colours as terminal codes.
    decoded = preview_text(dataset, tokenizer, width=console.width, index=index, colour=colour, max_lines=max_lines)
    parts: list[RenderableType] = [
        Rule(Text(heading, style="bold", overflow="fold"), align="left"),
        Text.from_ansi(decoded, no_wrap=True, overflow="fold"),
    ]
    if show_document and row is None:
        parts.append(_plain_text("(no documents.arrow in this data set: its rows cannot be shown)"))
    elif show_document and row is not None:
        parts.append(Text("document:", style="bold"))
        parts.append(Padding(_document_text(row, max_lines), (0, 0, 0, 2)))
    return Group(*parts)


def _sample_heading(prepared: PreparedEntry, split: str, index: int, row: dict[str, Any] | None) -> str:
    """Write the heading of a shown sequence, on one line: its size, the location of its row, its label and further marks.

    "train 3 · 120 tokens, 40 learned · a.jsonl:7 · label spam · replay 1". Marks are numbers that the objective must know of a
    sequence. `row`: its row in `documents.arrow`; None without that file.
    """
    dataset = prepared.split(split)
    sample = dataset.sample(index)
    heading = f"{split} {index} · {dataset.lengths[index]:,} tokens, {int(dataset.num_supervised[index]):,} learned"
    # Turns may count for less than 1 in the loss.
    weight_sum = sample.total_target_weight()
    if weight_sum != dataset.num_supervised[index]:
        heading += f" (total weight {weight_sum:g})"
    if row is not None:
        heading += f" · {escape_control_characters(row['file'])}:{row['line']}"
    if dataset.labels is not None:
        label_names = prepared.manifest.get("label_names") or []
        label = int(dataset.labels[index])
        shown_label = escape_control_characters(label_names[label]) if 0 <= label < len(label_names) else label
        heading += f" · label {shown_label}"
    for name, mark in sample.marks.items():
        if name != LABEL:
            heading += f" · {name} {mark:g}"
    return heading


def _document_text(row: Mapping[str, Any], max_lines: int) -> RenderableType:
    """Show a row of `documents.arrow` as text: turns with their roles, other fields by name.

    Of more than `max_lines` lines, the middle is left out.
    """
    lines_and_styles: list[tuple[str, str]] = []
    for heading, text in _headed_texts(row):
        lines_and_styles.append((heading, "bold"))
        lines_and_styles += [(line, "") for line in escape_control_characters(text).split("\n")]
    num_left_out = len(lines_and_styles) - max_lines
    if num_left_out > 0:
        num_last = max_lines // 2
        num_first = max_lines - num_last
        note = (f"[... {num_left_out} lines ...]", "dim")
        last_lines = lines_and_styles[-num_last:] if num_last else []
        lines_and_styles = [*lines_and_styles[:num_first], note, *last_lines]
    return Text("\n", overflow="fold").join(
        Text(escape_control_characters(line), style=style) for line, style in lines_and_styles
    )


def _headed_texts(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """List the texts of a row of `documents.arrow` in reading order: (heading, text) of each turn and of each other field.

    Such as ("user", "Hi"), ("assistant (learned)", "Hello"), ("chosen: assistant", "Yes").
    """
    headed_texts: list[tuple[str, str]] = []
    if row.get("tools"):
        headed_texts.append(("tools", row["tools"]))
    for name in ("messages", "chosen", "rejected"):
        for turn in row.get(name) or ():
            heading = str(turn.get("role")) if name == "messages" else f"{name}: {turn.get('role')}"
            if turn.get("train") is not None:
                heading += " (learned)" if turn["train"] else " (not learned)"
            headed_texts.append((heading, turn["content"]))
            for key in ("reasoning_content", "tool_calls"):
                if turn.get(key):
                    headed_texts.append((f"{heading} {key}", turn[key]))
    for name in ("prompt", "completion", "text", "label", "desirable"):
        if row.get(name) is not None:
            headed_texts.append((name, str(row[name])))
    return headed_texts


def _empty_table(*column_names: str, **options: Any) -> Table:
    """An empty table; columns of names are aligned left, columns of numbers right."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left", **options)
    for name in column_names:
        justify: Any = "left" if name in ("split", "", "name") else "right"
        table.add_column(name, justify=justify, overflow="fold")
    return table


def _plain_text(shown: object) -> RenderableType:
    """Text of the data set on one line, never read as markup."""
    return Text(escape_control_characters(shown).replace("\n", "\\n"), overflow="fold")

"""A prepared data set found on disk, and in the terminal: its splits, the lengths of its sequences, samples beside documents.

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
from trainer.data.read.opening import read_object
from trainer.data.report.audit import make_histogram, split_sizes
from trainer.data.report.wording import percent, visible
from trainer.data.store.documents import NAME, DocumentTable
from trainer.data.store.sequences import LABEL, TokenDataset

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


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
        """The split, opened once. Raises ConfigError where there is none of the name, DataError for a torn one."""
        if name not in self.splits:
            raise ConfigError(f"split={name}: there is no such split; one of {', '.join(self.splits)}")
        if name not in self.opened:
            self.opened[name] = TokenDataset.open(self.splits[name])
        return self.opened[name]


def locate(path: Path) -> PreparedEntry:
    """The data set at `path`: its directory, one of its splits, or a run directory whose `run.json` names it.

    Raises ConfigError where there is none, DataError where a file of it cannot be read.
    """
    path = Path(path).expanduser()
    if not path.is_dir():
        raise ConfigError(f"{path}: there is no such directory; name a prepared data set or a run directory")
    if (path / "run.json").is_file():
        return locate(_data_directory_of_run(path))
    if not (path / "manifest.json").is_file():
        raise ConfigError(
            f"{path}: holds no manifest.json, so it is no prepared data set, and no run.json, so it is no run; "
            "shardtune prepare prints the directory it made"
        )
    if (path / "index.npy").is_file() and (path.parent / "manifest.json").is_file():
        found = locate(path.parent)
        found.requested_split = path.name
        return found
    inside = [entry for entry in path.iterdir() if (entry / "manifest.json").is_file()]
    inside.sort(key=lambda entry: (SPLIT_ORDER.get(entry.name, len(SPLIT_ORDER)), entry.name))
    splits = {entry.name: entry for entry in inside} or {path.name: path}
    return PreparedEntry(path, read_object(path / "manifest.json", PREPARE_AGAIN), splits)


def _data_directory_of_run(run: Path) -> Path:
    """The data directory of a run; a relative one counts from the working directory, else from the run."""
    named = read_object(run / "run.json", PREPARE_AGAIN).get("data_directory")
    if not named:
        raise ConfigError(f"{run / 'run.json'}: does not say where the data of the run is; name its prepared directory")
    for directory in (Path(named).expanduser(), run / named):
        if (directory / "manifest.json").is_file():
            return directory
    raise ConfigError(
        f"{named}: the prepared data of {run} is no longer there; prepare it again with shardtune prepare"
    )


def find_sequences(prepared: PreparedEntry, split: str, text: str) -> np.ndarray:
    """Sequences of a split whose document holds `text`, whatever its case: int64, in order.

    Searches the texts and labels of `documents.arrow`, batch by batch. Raises DataError where the data set has none.
    """
    path, data = prepared.directory / NAME, prepared.split(split)
    if not path.is_file():
        raise DataError(f"find=: {path} is not there, so texts cannot be searched; {PREPARE_AGAIN}")
    import pyarrow as pa
    import pyarrow.compute as pc

    hits, first = [np.zeros(0, np.int64)], 0
    try:
        for batch in pa.ipc.open_stream(pa.memory_map(str(path))):
            found = np.zeros(batch.num_rows, bool)
            for name, column in zip(batch.schema.names, batch.columns, strict=True):
                if name in ("prompt", "completion", "text", "label", "tools"):
                    found |= _contains(pc, column, text)
                elif name in ("messages", "chosen", "rejected"):
                    turns = pc.list_flatten(column)
                    said = ("content", "reasoning_content", "tool_calls")
                    inside = np.logical_or.reduce([_contains(pc, pc.struct_field(turns, key), text) for key in said])
                    found[pc.list_parent_indices(column).to_numpy(zero_copy_only=False)[inside]] = True
            hits.append(np.flatnonzero(found) + first)
            first += batch.num_rows
    except pa.ArrowException as error:
        raise DataError(f"{path}: cannot be read ({error}); {PREPARE_AGAIN}") from error
    return np.flatnonzero(np.isin(data.documents, np.concatenate(hits))).astype(np.int64)


def _contains(pc: Any, column: Any, text: str) -> np.ndarray:
    """bool [n]: whether each text holds `text`; nothing is held by null."""
    return np.asarray(pc.fill_null(pc.match_substring(column, text, ignore_case=True), False))


def load_tokenizer(prepared: PreparedEntry, path: str | None) -> PreTrainedTokenizerFast:
    """The tokenizer of the data set, or the one at `path`. Local files only.

    Raises ConfigError where there is none, or where its vocabulary has another size than the data was prepared with.
    """
    about = prepared.manifest.get("tokenizer") or {}
    where = path or about.get("path") or about.get("name")
    if not where:
        raise ConfigError("tokenizer=: the data set does not name its tokenizer; give the directory of the model")
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(str(where), local_files_only=True)
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise ConfigError(f"tokenizer={where}: cannot be loaded ({reason}); give the directory of the model") from error
    size, wanted = len(tokenizer), about.get("vocab_size")
    if wanted is not None and wanted not in (size, tokenizer.vocab_size):
        raise ConfigError(
            f"tokenizer={where}: has {size} tokens, the data was prepared with one of {wanted}; give that one"
        )
    return tokenizer


BINS = 16
MAX_GROUPS = 50


def splits_table(prepared: PreparedEntry) -> RenderableType:
    """Sizes of every split, counted from the arrays."""
    table = _table("split", "documents", "sequences", "tokens", "learned", "share", "p50", "p90", "longest")
    for name in prepared.splits:
        found = split_sizes(prepared.split(name))
        share = percent(found["supervised_share"])
        numbers = [f"{found[key]:,}" for key in ("documents", "sequences", "tokens", "supervised_tokens")]
        lengths = [f"{found[key]:,}" for key in ("length_p50", "length_p90", "length_max")]
        table.add_row(_text(name), *numbers, share, *lengths)
    return table


def groups_table(prepared: PreparedEntry, split: str) -> RenderableType | None:
    """Sequences and tokens of a split by source and by label; None where there is one source and no label."""
    data = prepared.split(split)
    rows: list[tuple[str, str, np.ndarray]] = []
    if len(data.source_names) > 1:
        rows += [("source", name, data.sources == number) for number, name in enumerate(data.source_names)]
    if data.labels is not None:
        names = prepared.manifest.get("label_names") or [str(n) for n in range(int(data.labels.max(initial=-1)) + 1)]
        rows += [("label", str(name), data.labels == number) for number, name in enumerate(names)]
    if not rows:
        return None
    table = _table("", "name", "sequences", "share", "tokens", title=f"{split}: by source and label")
    for kind, name, chosen in rows[:MAX_GROUPS]:
        number = int(chosen.sum())
        share = percent(number / len(data))
        table.add_row(kind, _text(name), f"{number:,}", share, f"{int(data.lengths[chosen].sum()):,}")
    if len(rows) > MAX_GROUPS:
        table.add_row("", f"... and {len(rows) - MAX_GROUPS} more", "", "", "")
    return table


def length_histogram(prepared: PreparedEntry, split: str, width: int) -> RenderableType:
    """Lengths of the sequences of a split in tokens, as bars within `width` columns."""
    data, title = prepared.split(split), Text(f"{split}: length of sequences in tokens", style="bold")
    found = make_histogram(data.lengths, BINS)
    ends = [(int(begin), int(end) - 1) for begin, end in pairwise(found.edges)]
    names = [f"{begin:,}-{end:,}" if end > begin else f"{begin:,}" for begin, end in ends]
    most, numbers = max(found.counts), [f"{count:,}" for count in found.counts]
    room = max(width - max(map(len, names)) - max(map(len, numbers)) - 4, 10)
    grid = Table.grid(padding=(0, 1))
    for justify in ("right", "left", "right"):
        grid.add_column(justify=justify, no_wrap=True)
    for name, count, number in zip(names, found.counts, numbers, strict=True):
        seen = max(count, most / room) if count else 0  # a bar that can be seen wherever there is a sequence
        grid.add_row(name, Bar(most, 0, seen, width=room, color="cyan"), number)
    return Group(title, grid)


def render_sample(
    prepared: PreparedEntry,
    split: str,
    index: int,
    tokenizer: PreTrainedTokenizerFast,
    console: Console,
    *,
    document: bool = False,
    max_lines: int = 40,
) -> RenderableType:
    """Sequence `index` decoded, what is learned in green on a terminal or between ⟦ and ⟧; `document`: and its row."""
    from trainer.data.report.preview import preview  # needs torch and pyarrow, and the sizes of a data set do not

    data = prepared.split(split)
    raw: dict[str, Any] | None = None
    if (prepared.directory / NAME).is_file():
        raw = DocumentTable(prepared.directory).row(int(data.documents[index]))
    colour = console.is_terminal and not console.no_color
    shown = preview(data, tokenizer, width=console.width, index=index, colour=colour, max_lines=max_lines)
    decoded = Text.from_ansi(shown, no_wrap=True, overflow="fold")
    words = f"{split} {index} · {data.lengths[index]:,} tokens, {int(data.num_supervised[index]):,} learned"
    if (weighing := data.sample(index).learned()) != data.num_supervised[index]:
        words += f" (weighing {weighing:g})"
    if raw is not None:
        words += f" · {visible(raw['file'])}:{raw['line']}"
    if data.labels is not None:
        names = prepared.manifest.get("label_names") or []
        number = int(data.labels[index])
        words += f" · label {visible(names[number]) if 0 <= number < len(names) else number}"
    words += "".join(f" · {name} {value:g}" for name, value in data.sample(index).marks.items() if name != LABEL)
    title = Rule(Text(words, style="bold", overflow="fold"), align="left")
    if not document or raw is None:
        note = [_text("(no documents.arrow in this data set: its rows cannot be shown)")] if document else []
        return Group(title, decoded, *note)
    source = Padding(_document_text(raw, max_lines), (0, 0, 0, 2))
    return Group(title, decoded, Text("document:", style="bold"), source)


def _document_text(raw: Mapping[str, Any], max_lines: int) -> RenderableType:
    """A row as text: turns with their roles, other fields by name; the middle of a long one is left out."""
    parts: list[tuple[str, str]] = []
    if raw.get("tools"):
        parts.append(("tools", raw["tools"]))
    for name in ("messages", "chosen", "rejected"):
        for turn in raw.get(name) or ():
            head = str(turn.get("role")) if name == "messages" else f"{name}: {turn.get('role')}"
            head += {True: " (learned)", False: " (not learned)"}.get(turn.get("train"), "")
            said = [("", turn["content"]), *((key, turn.get(key)) for key in ("reasoning_content", "tool_calls"))]
            parts += [(f"{head} {key}".rstrip(), text) for key, text in said if text or not key]
    named = ("prompt", "completion", "text", "label", "desirable")
    parts += [(name, str(raw[name])) for name in named if raw.get(name) is not None]
    lines: list[tuple[str, str]] = []
    for head, body in parts:
        lines += [(head, "bold"), *((line, "") for line in visible(body).split("\n"))]
    if len(lines) > max_lines:
        left_out, tail = len(lines) - max_lines, max_lines // 2
        note = (f"[... {left_out} lines ...]", "dim")
        lines = [*lines[: max_lines - tail], note, *(lines[-tail:] if tail else [])]
    shown = [(visible(line), style) for line, style in lines]
    return Text("\n", overflow="fold").join(Text(line, style=style) for line, style in shown)


def _table(*heads: str, **options: Any) -> Table:
    """A table of numbers; the columns that name something stand to the left."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left", **options)
    for name in heads:
        table.add_column(name, justify="left" if name in ("split", "", "name") else "right", overflow="fold")
    return table


def _text(words: object) -> RenderableType:
    """Words of the data set, never read as markup."""
    return Text(visible(words).replace("\n", "\\n"), overflow="fold")

"""A prepared data set in the terminal: its splits, the lengths of its sequences, and samples beside their documents.

Text of the data set is printed as it is, never as markup or as terminal codes.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from rich import box
from rich.bar import Bar
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from trainer.data.report.audit import distribution, sizes
from trainer.data.report.located import Entry, raw_document
from trainer.data.report.wording import percent, visible
from trainer.data.store.sequences import LABEL

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SIDE_BY_SIDE = 120
"""Columns of a terminal from which a document stands beside its sample instead of below."""
BINS = 16
MOST_GROUPS = 50


def splits_table(prepared: Entry) -> RenderableType:
    """Sizes of every split, counted from the arrays."""
    table = _table("split", "documents", "sequences", "tokens", "learned", "share", "p50", "p90", "longest")
    for name in prepared.splits:
        found = sizes(prepared.split(name))
        share = percent(found["supervised_share"])
        numbers = [f"{found[key]:,}" for key in ("documents", "sequences", "tokens", "supervised_tokens")]
        lengths = [f"{found[key]:,}" for key in ("length_p50", "length_p90", "length_max")]
        table.add_row(_text(name), *numbers, share, *lengths)
    return table


def groups_table(prepared: Entry, split: str) -> RenderableType | None:
    """Sequences and tokens of a split by source and by label; None where there is one source and no label."""
    data = prepared.split(split)
    rows: list[tuple[str, str, np.ndarray]] = []
    if data.sources is not None and len(data.source_names) > 1:
        rows += [("source", name, data.sources == number) for number, name in enumerate(data.source_names)]
    if data.labels is not None:
        names = prepared.manifest.get("label_names") or [str(n) for n in range(int(data.labels.max(initial=-1)) + 1)]
        rows += [("label", str(name), data.labels == number) for number, name in enumerate(names)]
    if not rows:
        return None
    table = _table("", "name", "sequences", "share", "tokens", title=f"{split}: by source and label")
    for kind, name, chosen in rows[:MOST_GROUPS]:
        number = int(chosen.sum())
        share = percent(number / len(data) if len(data) else 0.0)
        table.add_row(kind, _text(name), f"{number:,}", share, f"{int(data.lengths[chosen].sum()):,}")
    if len(rows) > MOST_GROUPS:
        table.add_row("", f"... and {len(rows) - MOST_GROUPS} more", "", "", "")
    return table


def histogram(prepared: Entry, split: str, width: int) -> RenderableType:
    """Lengths of the sequences of a split in tokens, as bars within `width` columns."""
    data, title = prepared.split(split), Text(f"{split}: length of sequences in tokens", style="bold")
    if not len(data):
        return Group(title, "  no sequences")
    found = distribution(data.lengths, BINS)
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


def sample(
    prepared: Entry,
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
    raw = raw_document(prepared, split, index) if document or data.documents is not None else None
    beside = document and console.width >= SIDE_BY_SIDE
    width = (console.width - 3) // 2 if beside else console.width
    colour = console.is_terminal and not console.no_color
    shown = preview(data, tokenizer, width=width, index=index, colour=colour, max_lines=max_lines)
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
    source = _document_text(raw, max_lines)
    if not beside:
        return Group(title, decoded, Text("document:", style="bold"), Padding(source, (0, 0, 0, 2)))
    grid = Table.grid(padding=(0, 1))
    grid.add_column(width=width)
    grid.add_column(width=width)
    grid.add_row(decoded, source)
    return Group(title, grid)


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

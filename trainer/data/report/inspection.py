"""A prepared data set in the terminal: its splits, the lengths of its sequences, and samples beside their documents.

Text of the data set is printed as it is, never as markup or as terminal codes.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer.data.report.located import Prepared, raw_document
from trainer.data.report.wording import percent, visible

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from transformers import PreTrainedTokenizerFast

SIDE_BY_SIDE = 120
"""Columns of a terminal from which a document stands beside its sample instead of below."""
BINS = 16


def splits_table(prepared: Prepared) -> RenderableType:
    """Sizes of every split, counted from the arrays."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name, justify in (("split", "left"), *((n, "right") for n in _COLUMNS)):
        table.add_column(name, justify="right" if justify == "right" else "left", overflow="fold")
    for name in prepared.splits:
        data = prepared.split(name)
        lengths = data.lengths
        tokens, learned = int(lengths.sum()), int(data.num_supervised.sum())
        quantiles = np.quantile(lengths, (0.5, 0.9)).round().astype(int).tolist() if len(data) else [0, 0]
        documents = len(data) if data.documents is None else len(np.unique(data.documents))
        numbers = [f"{n:,}" for n in (documents, len(data), tokens, learned)]
        rest = [f"{n:,}" for n in (*quantiles, int(lengths.max()) if len(data) else 0)]
        table.add_row(_text(name), *numbers, percent(learned / tokens if tokens else 0.0), *rest)
    return table


_COLUMNS = ("documents", "sequences", "tokens", "learned", "share", "p50", "p90", "longest")


def groups_table(prepared: Prepared, split: str) -> RenderableType | None:
    """Sequences and tokens of a split by source and by label; None where there is one source and no label."""
    from rich import box
    from rich.table import Table

    data = prepared.split(split)
    rows: list[tuple[str, str, np.ndarray]] = []
    if data.sources is not None and len(data.source_names) > 1:
        rows += [("source", name, data.sources == number) for number, name in enumerate(data.source_names)]
    if data.labels is not None:
        names = prepared.manifest.get("label_names") or [str(n) for n in range(int(data.labels.max(initial=-1)) + 1)]
        rows += [("label", str(name), data.labels == number) for number, name in enumerate(names)]
    if not rows:
        return None
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=f"{split}: by source and label", title_justify="left")
    for name in ("", "name", "sequences", "share", "tokens"):
        table.add_column(name, justify="left" if name in ("", "name") else "right")
    for kind, name, chosen in rows[:50]:
        number = int(chosen.sum())
        share = percent(number / len(data) if len(data) else 0.0)
        table.add_row(kind, _text(name), f"{number:,}", share, f"{int(data.lengths[chosen].sum()):,}")
    if len(rows) > 50:
        table.add_row("", f"... and {len(rows) - 50} more", "", "", "")
    return table


def histogram(prepared: Prepared, split: str, width: int) -> RenderableType:
    """Lengths of the sequences of a split in tokens, as bars within `width` columns."""
    from rich.text import Text

    data = prepared.split(split)
    out = Text(f"{split}: length of sequences in tokens\n", style="bold")
    if not len(data):
        return out.append("  no sequences", style="not bold")
    low, high = int(data.lengths.min()), int(data.lengths.max())
    step = max(1, -(-(high - low + 1) // BINS))
    edges = low + step * np.arange(-(-(high - low + 1) // step) + 1)
    counts, _ = np.histogram(data.lengths, bins=edges)
    shown = [f"{begin:,}-{end - 1:,}" if step > 1 else f"{begin:,}" for begin, end in pairwise(edges.tolist())]
    left, right = max(map(len, shown)), max(len(f"{count:,}") for count in counts)
    room = max(width - left - right - 4, 10)
    for label, count in zip(shown, counts.tolist(), strict=True):
        eighths = round(count / max(counts.max(), 1) * room * 8)
        eighths = max(eighths, 1) if count else 0
        bar = "█" * (eighths // 8) + ("▏▎▍▌▋▊▉"[eighths % 8 - 1] if eighths % 8 else "")
        out.append(f"{label:>{left}} ", style="not bold").append(bar, style="not bold cyan")
        out.append(f" {count:,}\n", style="not bold")
    out.rstrip()
    return out


def sample(
    prepared: Prepared,
    split: str,
    index: int,
    tokenizer: PreTrainedTokenizerFast,
    console: Console,
    *,
    document: bool = False,
    max_lines: int = 40,
) -> RenderableType:
    """Sequence `index` decoded, what is learned in green on a terminal or between ⟦ and ⟧; `document`: and its row."""
    from rich.console import Group
    from rich.padding import Padding
    from rich.rule import Rule
    from rich.table import Table
    from rich.text import Text

    from trainer.data.report.preview import preview

    data = prepared.split(split)
    raw = raw_document(prepared, split, index) if document or data.documents is not None else None
    beside = document and console.width >= SIDE_BY_SIDE
    width = (console.width - 3) // 2 if beside else console.width
    colour = console.is_terminal and not console.no_color
    shown = preview(data, tokenizer, width=width, index=index, colour=colour, max_lines=max_lines)
    decoded = Text.from_ansi(shown, no_wrap=True, overflow="fold")
    words = (
        f"{split} {index} · {len(data.sample(index).input_ids):,} tokens, {int(data.num_supervised[index]):,} learned"
    )
    if raw is not None:
        words += f" · {visible(raw['file'])}:{raw['line']}"
    if data.labels is not None:
        names = prepared.manifest.get("label_names") or []
        number = int(data.labels[index])
        words += f" · label {visible(names[number]) if 0 <= number < len(names) else number}"
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
    from rich.text import Text

    parts: list[tuple[str, str]] = []
    for name in ("messages", "chosen", "rejected"):
        for turn in raw.get(name) or ():
            head = str(turn.get("role")) if name == "messages" else f"{name}: {turn.get('role')}"
            parts.append(
                (head + {True: " (learned)", False: " (not learned)"}.get(turn.get("train"), ""), turn["content"])
            )
    for name in ("prompt", "completion", "text", "label", "desirable"):
        if raw.get(name) is not None:
            parts.append((name, str(raw[name])))
    lines: list[tuple[str, str]] = []
    for head, body in parts:
        lines += [(head, "bold"), *((line, "") for line in visible(body).split("\n"))]
    if len(lines) > max_lines:
        left_out, tail = len(lines) - max_lines, max_lines // 2
        note = (f"[... {left_out} lines ...]", "dim")
        lines = [*lines[: max_lines - tail], note, *(lines[-tail:] if tail else [])]
    out = Text(overflow="fold")
    for position, (line, style) in enumerate(lines):
        out.append(("\n" if position else "") + visible(line), style=style or None)
    return out


def _text(words: object) -> RenderableType:
    """Words of the data set, never read as markup."""
    from rich.text import Text

    return Text(visible(words).replace("\n", "\\n"), overflow="fold")

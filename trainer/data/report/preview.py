"""What a run shows before its first step: which tokens are learned, and what preparation did to the data."""

from __future__ import annotations

import os
import sys
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import numpy as np

from strategies.errors import DataError
from trainer.data.report.wording import REASON_TEXTS, templates, visible
from trainer.data.store.sequences import Sample, TokenDataset
from trainer.data.transforms.privacy.rule import NOT_ASKED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from trainer.data.objective_spec import Reading

GREEN, RESET = "\x1b[32m", "\x1b[0m"


def preview(
    dataset: TokenDataset,
    tokenizer: PreTrainedTokenizerFast,
    reading: Reading | None = None,
    label_names: list[str] | None = None,
    *,
    width: int,
    index: int = 0,
    colour: bool | None = None,
    max_lines: int = 40,
) -> str:
    """The document that begins at sequence `index` as text, under the headings and above the notes of `reading`.

    See `render_pieces`; without a reading, that one sequence alone.
    """
    parts = []
    for place, head in enumerate(reading.headings() if reading is not None else [""]):
        sample = dataset.sample(index + place)
        note = reading.note(sample, label_names) if reading is not None else ""
        shown = render_pieces(decode_pieces(sample, tokenizer), width=width, colour=colour, max_lines=max_lines)
        parts.append(head + shown + (f"\n{note}" if note else ""))
    return "\n".join(parts)


def render_pieces(runs: list[tuple[str, float]], *, width: int, colour: bool | None = None, max_lines: int = 40) -> str:
    """Text of `decode_pieces`, the learned part in green on a terminal, else between ⟦ and ⟧; after it its weight, if not 1.

    `width` is the longest line in characters; of a long document the middle is left out.
    """
    if colour is None:
        colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    cells: list[tuple[str, bool]] = []
    for text, weight in runs:
        marked = f"⟦{text}⟧" if weight and not colour else text
        marked += f"*{weight:g}" if 0 < weight < 1 else ""
        cells += [(character, weight > 0) for character in marked]
    lines = _wrap(cells, max(width, 1))
    if len(lines) > max_lines:
        head, left_out = max_lines - max_lines // 2, len(lines) - max_lines
        note = [(c, False) for c in f"[... {left_out} lines ...]"]
        lines = [*lines[:head], note, *lines[len(lines) - max_lines // 2 :]]
    return "\n".join(_paint(line) if colour else "".join(c for c, _ in line) for line in lines)


def decode_pieces(sample: Sample, tokenizer: PreTrainedTokenizerFast) -> list[tuple[str, float]]:
    """The decoded text of a sample in runs of tokens that are all context (0) or all learned, with the same weight.

    Characters that a terminal or a page would act on instead of showing are spelled as \\xNN.
    """
    weights = sample.supervised * (np.float32(1) if sample.weights is None else sample.weights)
    edges = np.flatnonzero(np.diff(weights)) + 1
    out = []
    for ids, weighing in zip(np.split(sample.input_ids, edges), np.split(weights, edges), strict=True):
        part = tokenizer.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        visible = "".join(c if c == "\n" or c.isprintable() else f"\\x{ord(c):02x}" for c in part)  # no escape codes
        out.append((visible, float(f"{weighing[0]:.6g}") if len(weighing) else 0.0))
    return out


def _wrap(cells: list[tuple[str, bool]], width: int) -> list[list[tuple[str, bool]]]:
    lines: list[list[tuple[str, bool]]] = [[]]
    for cell in cells:
        if cell[0] == "\n" or len(lines[-1]) == width:
            lines.append([])
        if cell[0] != "\n":
            lines[-1].append(cell)
    return lines


def _paint(line: list[tuple[str, bool]]) -> str:
    runs = [(learned, "".join(c for c, _ in run)) for learned, run in groupby(line, key=itemgetter(1))]
    return "".join(f"{GREEN}{text}{RESET}" if learned else text for learned, text in runs)


def summary(report: dict[str, Any]) -> str:
    """A few lines: rows lost, every split, what was dropped or changed and why. Raises DataError where one has two BOS."""
    for split in ("train", "eval", "test"):
        if doubled := report.get(split, {}).get("doubled_bos"):
            raise DataError(f"{split}: {doubled} documents begin with two BOS; check model.chat_template")
    template = templates(visible, autoescape=False).get_template("terminal.txt.j2")
    return template.render(report=report, said=REASON_TEXTS, not_asked=NOT_ASKED).rstrip("\n")

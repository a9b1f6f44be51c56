"""What a run shows before its first step: which tokens are learned, and what preparation did to the data."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

import numpy as np

from strategies.errors import DataError
from trainer.data.dataset import TokenDataset

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

GREEN, RESET = "\x1b[32m", "\x1b[0m"
TROUBLES = {
    "truncated": "truncated to data.max_length",
    "dropped_too_long": "dropped, longer than data.max_length",
    "dropped_unsupervised": "dropped, nothing left to learn",
    "control_tokens": "text spells control tokens of the tokenizer",
}
"""What preparation counts and keeps examples of, and how the summary says it."""


def preview(
    dataset: TokenDataset,
    tokenizer: PreTrainedTokenizerFast,
    *,
    width: int,
    index: int = 0,
    colour: bool | None = None,
    max_lines: int = 40,
) -> str:
    """Document `index` as text, its supervised tokens in green on a terminal, else between ⟦ and ⟧.

    `width` is the longest line in characters; of a long document the middle is left out.
    """
    if colour is None:
        colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    sample = dataset.sample(index)
    edges = np.flatnonzero(np.diff(sample.supervised.astype(np.int8))) + 1
    parts = []
    for ids in np.split(sample.input_ids, edges):
        parts.append(tokenizer.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False))
    learned = bool(len(sample.supervised)) and bool(sample.supervised[0])
    cells: list[tuple[str, bool]] = []
    for part in parts:
        visible = "".join(c if c == "\n" or c.isprintable() else f"\\x{ord(c):02x}" for c in part)  # no escape codes
        if learned and not colour:
            visible = f"⟦{visible}⟧"
        cells += [(character, learned) for character in visible]
        learned = not learned
    lines = _wrap(cells, max(width, 1))
    if len(lines) > max_lines:
        head, left_out = max_lines - max_lines // 2, len(lines) - max_lines
        note = [(c, False) for c in f"[... {left_out} lines ...]"]
        lines = [*lines[:head], note, *lines[len(lines) - max_lines // 2 :]]
    label = "" if sample.label is None else f"\nlabel: {sample.label}"
    return "\n".join(_paint(line) if colour else "".join(c for c, _ in line) for line in lines) + label


def _wrap(cells: list[tuple[str, bool]], width: int) -> list[list[tuple[str, bool]]]:
    lines: list[list[tuple[str, bool]]] = [[]]
    for cell in cells:
        if cell[0] == "\n":
            lines.append([])
            continue
        if len(lines[-1]) == width:
            lines.append([])
        lines[-1].append(cell)
    return lines


def _paint(line: list[tuple[str, bool]]) -> str:
    out, on = [], False
    for character, learned in line:
        if learned is not on:
            out.append(GREEN if learned else RESET)
            on = learned
        out.append(character)
    return "".join(out) + (RESET if on else "")


def summary(report: dict[str, Any]) -> str:
    """A few lines a split. Raises DataError if a document begins with two BOS tokens."""
    lines = []
    for split in ("train", "eval"):
        if split not in report:
            continue
        part = report[split]
        if part["doubled_bos"]:
            raise DataError(f"{split}: {part['doubled_bos']} documents begin with two BOS; check model.chat_template")
        documents = part["documents"]
        lines.append(
            f"{split}: {documents:,} documents, {part['tokens']:,} tokens; length p50 {part['length_p50']}, "
            f"p90 {part['length_p90']}, max {part['length_max']}"
        )
        if not part["labelled"]:
            lines.append(
                f"  supervised: {part['supervised_tokens']:,} tokens ({part['supervised_share']:.1%}); end of turn "
                f"supervised in {part['ends_supervised']:,} of {documents:,} documents; doubled BOS 0"
            )
        for name, text in TROUBLES.items():
            if part[name]["count"]:
                examples = ", ".join(part[name]["examples"])
                lines.append(f"  {text}: {part[name]['count']:,} documents (first: {examples})")
    return "\n".join(lines)

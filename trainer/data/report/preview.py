"""What a run shows before its first step: which tokens are learned, and what preparation did to the data."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import numpy as np

from strategies.errors import DataError
from trainer.data.report.wording import REASON_TEXTS, templates, visible
from trainer.data.store.sequences import Sample, TokenDataset
from trainer.data.transforms.privacy.rule import NOT_ASKED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from trainer.data.objective_spec import DataSpec

GREEN = "\x1b[32m"
RESET = "\x1b[0m"


def preview(
    dataset: TokenDataset,
    tokenizer: PreTrainedTokenizerBase,
    data_spec: DataSpec | None = None,
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
    headings = data_spec.headings() if data_spec is not None else [""]
    parts = []
    for number, heading in enumerate(headings, index):
        sample = dataset.sample(number)
        note = data_spec.note(sample, label_names) if data_spec is not None else ""
        text = render_pieces(decode_pieces(sample, tokenizer), width=width, colour=colour, max_lines=max_lines)
        parts.append(heading + text + (f"\n{note}" if note else ""))
    return "\n".join(parts)


def render_pieces(runs: list[tuple[str, float]], *, width: int, colour: bool | None = None, max_lines: int = 40) -> str:
    """Text of `decode_pieces`, the learned part in green on a terminal, else between ⟦ and ⟧; then its weight, if not 1.

    `width` is the longest line in characters; of a long document the middle is left out.
    """
    if colour is None:
        colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    # (character, whether it is learned)
    cells: list[tuple[str, bool]] = []
    for text, weight in runs:
        is_learned = weight > 0
        marked_text = text if colour or not weight else f"⟦{text}⟧"
        if 0 < weight < 1:
            marked_text += f"*{weight:g}"
        cells += [(character, is_learned) for character in marked_text]
    lines = _wrap(cells, max(width, 1))
    if len(lines) > max_lines:
        num_tail = max_lines // 2
        note = [(character, False) for character in f"[... {len(lines) - max_lines} lines ...]"]
        lines = [*lines[: max_lines - num_tail], note, *lines[len(lines) - num_tail :]]
    to_text = _paint if colour else _join
    return "\n".join(map(to_text, lines))


def decode_pieces(sample: Sample, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, float]]:
    """The decoded text of a sample in runs of tokens that are all context (0) or all learned, with the same weight.

    Characters that a terminal or a page would act on instead of showing are spelled as \\xNN.
    """
    # 0 where a token is context, so one array tells context, learned and weighted tokens apart.
    weights = sample.supervised * (np.float32(1) if sample.weights is None else sample.weights)
    edges = np.flatnonzero(np.diff(weights)) + 1
    pieces = []
    for ids, run_weights in zip(np.split(sample.input_ids, edges), np.split(weights, edges), strict=True):
        text = tokenizer.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        weight = float(f"{run_weights[0]:.6g}") if len(run_weights) else 0.0
        pieces.append(("".join(map(_without_escape_codes, text)), weight))
    return pieces


def _without_escape_codes(character: str) -> str:
    return character if character == "\n" or character.isprintable() else f"\\x{ord(character):02x}"


def _wrap(cells: list[tuple[str, bool]], width: int) -> list[list[tuple[str, bool]]]:
    """Cells in lines of at most `width`; a newline begins a line and is in none."""
    lines: list[list[tuple[str, bool]]] = [[]]
    for cell in cells:
        is_newline = cell[0] == "\n"
        if is_newline or len(lines[-1]) == width:
            lines.append([])
        if not is_newline:
            lines[-1].append(cell)
    return lines


def _join(line: Iterable[tuple[str, bool]]) -> str:
    return "".join(character for character, _ in line)


def _paint(line: list[tuple[str, bool]]) -> str:
    """A line with terminal codes around what is learned."""
    painted = ""
    for is_learned, run in groupby(line, key=itemgetter(1)):
        text = _join(run)
        painted += f"{GREEN}{text}{RESET}" if is_learned else text
    return painted


def summary(report: dict[str, Any]) -> str:
    """A few lines: rows lost, every split, what was dropped or changed and why. Raises DataError where one has two BOS."""
    for split in ("train", "eval", "test"):
        doubled_bos = report.get(split, {}).get("doubled_bos")
        if doubled_bos:
            raise DataError(f"{split}: {doubled_bos} documents begin with two BOS; check model.chat_template")
    template = templates(visible, autoescape=False).get_template("terminal.txt.j2")
    return template.render(report=report, said=REASON_TEXTS, not_asked=NOT_ASKED).rstrip("\n")

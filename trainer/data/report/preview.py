"""Shows, before the first step of a run, which tokens are learned, and what preparation did to the data."""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby, islice
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import numpy as np

from strategies.errors import DataError
from trainer.data.report.masked_samples import (
    LEFT_OUT_NOTE,
    MASK_NOTE,
    WeightedPiece,
    has_reported_personal_data,
    piece_masker,
    samples_can_be_masked,
)
from trainer.data.report.wording import (
    REASON_TEXT_BY_CODE,
    escape_control_characters,
    few_ends_learned,
    template_environment,
)
from trainer.data.store.sequences import Sample, TokenDataset
from trainer.data.transforms.privacy.rule import NOT_ASKED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from trainer.data.config import PrivacyConfig
    from trainer.data.objective_spec import DataSpec

GREEN = "\x1b[32m"
RESET = "\x1b[0m"
PreviewCell = tuple[str, bool]
"""A character, and whether it is learned."""


def preview_text(
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
    """Show the document that begins at sequence `index` as text for the terminal; what is learned is green, or between ⟦ and ⟧.

    With a `data_spec`, all sequences of the document, each under its heading ("chosen", "rejected") and above its note; without
    one, the sequence alone. `label_names`: in the order of their ids, for the notes. `width`: the longest line in characters.
    `colour` of None: as the terminal allows. If there are more than `max_lines` lines, the middle is left out.
    """

    def show(sample: Sample) -> str:
        pieces = decode_weighted_pieces(sample, tokenizer)
        return render_pieces(pieces, width=width, colour=colour, max_lines=max_lines)

    return _text_of_document(dataset, data_spec, label_names, index, show)


def start_preview_text(
    dataset: TokenDataset,
    tokenizer: PreTrainedTokenizerBase,
    data_spec: DataSpec,
    label_names: list[str] | None = None,
    *,
    width: int,
    report: dict[str, Any],
    privacy: PrivacyConfig,
) -> str:
    """Show the first training document as the start of a run and a dry run do: that of `preview_text`, and no personal data.

    If preparation found personal data and left it in the data (`data.privacy.mode=report`), it is masked here, since the text
    also goes into logs; a line below says so. If it can be found by Presidio alone, that line stands in place of the document.
    `report`: `Audit.report` of the data.
    """
    if not has_reported_personal_data(report):
        return preview_text(dataset, tokenizer, data_spec, label_names, width=width)
    if not samples_can_be_masked(privacy):
        return LEFT_OUT_NOTE
    mask_pieces = piece_masker(privacy)

    def show(sample: Sample) -> str:
        return render_pieces(mask_pieces(decode_weighted_pieces(sample, tokenizer)), width=width)

    return f"{_text_of_document(dataset, data_spec, label_names, 0, show)}\n{MASK_NOTE}"


def _text_of_document(
    dataset: TokenDataset,
    data_spec: DataSpec | None,
    label_names: list[str] | None,
    index: int,
    show: Callable[[Sample], str],
) -> str:
    """The sequences of the document that begins at sequence `index`, each by `show`, under its heading and above its note.

    Without a `data_spec`, the sequence alone. `label_names`: in the order of their ids, for the notes.
    """
    # A document has as many sequences as its objective has headings, such as "chosen" and "rejected".
    headings = data_spec.headings() if data_spec is not None else [""]
    texts = []
    for sequence, heading in enumerate(headings, start=index):
        sample = dataset.sample(sequence)
        text = heading + show(sample)
        note = data_spec.note(sample, label_names) if data_spec is not None else ""
        if note:
            text += f"\n{note}"
        texts.append(text)
    return "\n".join(texts)


def render_pieces(pieces: list[WeightedPiece], *, width: int, colour: bool | None = None, max_lines: int = 40) -> str:
    """Show a decoded sample in the terminal: what is learned is green, or between ⟦ and ⟧, with its weight behind it if below 1.

    `pieces`: (text, loss weight). `width`: the longest line in characters. `colour` of None: as the terminal allows. If there are
    more than `max_lines` lines, the middle is left out.
    """
    if colour is None:
        colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    cells = _preview_cells(pieces, has_brackets=not colour)
    lines, num_left_out = _first_and_last_lines(_wrap_cells(cells, max(width, 1)), max_lines)
    if num_left_out:
        note = [(character, False) for character in f"[... {num_left_out} lines ...]"]  # not learned
        num_first_lines = max_lines - max_lines // 2
        lines.insert(num_first_lines, note)
    line_to_text = _in_colour if colour else _without_colour
    return "\n".join(map(line_to_text, lines))


def _preview_cells(pieces: list[WeightedPiece], *, has_brackets: bool) -> Iterator[PreviewCell]:
    """Split pieces of a decoded sample into their characters, each with whether it is learned.

    With `has_brackets`, ⟦ and ⟧ stand around learned pieces. A weight below 1 is shown behind the piece, as "*0.5". `pieces`:
    (text, loss weight; 0 for context).
    """
    for text, weight in pieces:
        is_learned = weight > 0
        shown_text = f"⟦{text}⟧" if has_brackets and is_learned else text
        if 0 < weight < 1:
            shown_text += f"*{weight:g}"
        for character in shown_text:
            yield character, is_learned


def _first_and_last_lines(lines: Iterator[list[PreviewCell]], max_lines: int) -> tuple[list[list[PreviewCell]], int]:
    """Take the first and the last lines of a text, `max_lines` together at most: (the lines, how many were left out between).

    Never holds more lines than that, because a document may have a million tokens. A line is a list of (character, whether it is
    learned).
    """
    num_last = max_lines // 2
    first_lines = list(islice(lines, max_lines - num_last))
    last_lines: deque[list[PreviewCell]] = deque(maxlen=num_last)
    num_lines = len(first_lines)
    for line in lines:
        last_lines.append(line)
        num_lines += 1
    return [*first_lines, *last_lines], num_lines - len(first_lines) - len(last_lines)


def decode_weighted_pieces(sample: Sample, tokenizer: PreTrainedTokenizerBase) -> list[WeightedPiece]:
    r"""Decode a sample to text, in pieces (text, weight), each of which is all context (0) or all learned with one weight.

    Example: [("Question: ", 0.0), ("Answer", 1.0)]. Characters that a terminal or a page would act on instead of showing are
    spelled as \xNN.
    """
    # A token of context has weight 0, so that one array tells context, learned and weighted tokens apart.
    weights = sample.supervised * (np.float32(1) if sample.weights is None else sample.weights)
    cut_points = np.flatnonzero(np.diff(weights)) + 1  # where the weight changes
    pieces = []
    for ids, piece_weights in zip(np.split(sample.input_ids, cut_points), np.split(weights, cut_points), strict=True):
        text = tokenizer.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        # Rounded to what a float32 distinguishes, so that 0.1 is not shown as 0.10000000149.
        weight = float(f"{piece_weights[0]:.6g}") if len(piece_weights) else 0.0
        pieces.append(("".join(map(_escape_unprintable, text)), weight))
    return pieces


def _escape_unprintable(character: str) -> str:
    """A character, spelled as \\xNN if a terminal would act on it; line breaks stay."""
    if character == "\n" or character.isprintable():
        return character
    return f"\\x{ord(character):02x}"


def _wrap_cells(cells: Iterable[PreviewCell], width: int) -> Iterator[list[PreviewCell]]:
    """Break (character, whether it is learned) cells into lines of at most `width`; a newline begins a line and is in none."""
    line: list[PreviewCell] = []
    for cell in cells:
        character, _ = cell
        is_newline = character == "\n"
        if is_newline or len(line) == width:
            yield line
            line = []
        if not is_newline:
            line.append(cell)
    yield line


def _without_colour(line: Iterable[PreviewCell]) -> str:
    """The text of a line."""
    return "".join(character for character, _ in line)


def _in_colour(line: list[PreviewCell]) -> str:
    """The text of a line with terminal codes around what is learned."""
    coloured = ""
    for is_learned, run in groupby(line, key=itemgetter(1)):
        text = _without_colour(run)
        coloured += f"{GREEN}{text}{RESET}" if is_learned else text
    return coloured


def summary_text(report: dict[str, Any]) -> str:
    """Write a few lines on prepared data for the terminal: rows lost, every split, what was dropped or changed and why.

    `report`: `Audit.report`. Raises DataError if sequences of a split begin with two BOS.
    """
    _check_no_doubled_bos(report)
    template = template_environment(escape_control_characters).get_template("terminal.txt.j2")
    text = template.render(
        report=report,
        reason_texts=REASON_TEXT_BY_CODE,
        not_asked=NOT_ASKED,
        is_prompts_alone=is_prompts_alone,
        few_ends_learned=few_ends_learned,
    )
    return text.rstrip("\n")


def _check_no_doubled_bos(report: dict[str, Any]) -> None:
    """Raise DataError if sequences of a split begin with two BOS, which no pretraining text does."""
    for split in ("train", "eval", "test"):
        num_doubled_bos = report.get(split, {}).get("doubled_bos")
        if num_doubled_bos:
            raise DataError(f"{split}: {num_doubled_bos} documents begin with two BOS; check model.chat_template")


def is_prompts_alone(split_report: dict[str, Any]) -> bool:
    """Whether a split has prompts alone, whose answers the model generates while it trains. `split_report`: see `Audit.report`.

    Preparation refuses other splits without supervised tokens, unless their documents have labels.
    """
    return not split_report.get("labelled") and split_report.get("supervised_tokens") == 0

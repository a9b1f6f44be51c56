"""What a run shows before its first step: which tokens are learned, and what preparation did to the data."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

import numpy as np

from strategies.errors import DataError
from trainer.data.report.wording import SAID, percent, plural, visible
from trainer.data.stages.privacy.config import NOT_ASKED
from trainer.data.store.sequences import Sample, TokenDataset

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from trainer.data.reading import Reading

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

    See `render`; without a reading, that one sequence alone.
    """
    parts = []
    for place, head in enumerate(reading.headings() if reading is not None else [""]):
        sample = dataset.sample(index + place)
        note = reading.note(sample, label_names) if reading is not None else ""
        shown = render(pieces(sample, tokenizer), width=width, colour=colour, max_lines=max_lines)
        parts.append(head + shown + (f"\n{note}" if note else ""))
    return "\n".join(parts)


def render(runs: list[tuple[str, float]], *, width: int, colour: bool | None = None, max_lines: int = 40) -> str:
    """Text of `pieces`, the learned part in green on a terminal, else between ⟦ and ⟧; after it its weight, if not 1.

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


def pieces(sample: Sample, tokenizer: PreTrainedTokenizerFast) -> list[tuple[str, float]]:
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
    """A few lines: rows lost, every split, what was dropped or changed and why. Raises DataError where one has two BOS."""
    rows = report["conserved"]
    lines = [
        f"rows: {plural(rows['rows_in'], 'row')} read = {rows['kept']:,} kept + {rows['dropped']:,} dropped "
        f"({percent(rows['dropped'] / max(rows['rows_in'], 1))} lost)"
    ]
    for split in ("train", "eval", "test"):
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
                f"  supervised: {part['supervised_tokens']:,} tokens ({part['supervised_share']:.1%})"
                f"{_weighing(part)}; end of turn supervised in "
                f"{part['ends_supervised']:,} of {part['sequences']:,} sequences; doubled BOS 0"
            )
    for stage in report.get("flow", ()):
        mode = report.get("privacy", {}).get("mode") if stage["stage"] == "privacy" else None
        done = "replaced" if mode in ("redact", "pseudonymise") else "kept"
        for verb, counts in (("dropped", stage["dropped"]), (done, stage["noted"])):
            for reason, count in counts.items():
                first = ", ".join(stage["examples"].get(reason, ())[:2])
                said = SAID.get(reason, f"{stage['stage']}: {reason.replace('_', ' ')}")
                lines.append(f"  {verb}, {said}: {count:,}" + (f" (first: {first})" if first else ""))
    privacy = report.get("privacy") or {}
    unsought = {kind: why for kind, why in privacy.get("not_looked_for", {}).items() if why != NOT_ASKED}
    if unsought and privacy["mode"] != "report":
        said = ", ".join(f"{kind} ({why})" for kind, why in unsought.items())
        lines.append(f"  personal data not looked for: {said}")
    for kind, found in report.get("duplicates", {}).items():
        if found["documents"] and found["policy"] == "report":
            places = ", ".join(f"{e['b']} = {e['a']}" for e in found["examples"][:2])
            lines.append(
                f"{kind} duplicates: {found['documents']:,} documents, kept (data.duplicates.{kind}=drop removes them; "
                f"first: {places})"
            )
    lines += _leakage(report)
    for source, names in report.get("unread_columns", {}).items():
        lines.append(
            f"columns of {visible(source)} that nobody read: {visible(', '.join(names))} (data.ignore_columns says it is meant)"
        )
    return "\n".join(lines)


def _weighing(part: dict[str, Any]) -> str:
    weight = part.get("weighted_tokens")
    return "" if weight is None else f", weighing {weight:,.10g}"


def _leakage(report: dict[str, Any]) -> list[str]:
    lines = []
    for split, found in report.get("leakage", {}).items():
        count, prompts = sum(found["train"].values()) - found["train"]["prompt"], found["train"]["prompt"]
        if count and found["policy"] == "report":
            lines.append(
                f"leakage: {count:,} training documents are in the {split} split too, kept "
                "(data.leakage.policy=drop_train removes them)"
            )
        if prompts:
            lines.append(
                f"leakage: {prompts:,} training documents have a prompt of the {split} split, with another answer"
            )
    for split, part in report.get("groups", {}).items():
        shared = f"; {part['in_training']:,} training documents were of them" if part["in_training"] else ""
        lines.append(
            f"groups (data.group_by), {split}: {part['groups']:,} with {part['documents']:,} documents{shared}"
        )
    return lines

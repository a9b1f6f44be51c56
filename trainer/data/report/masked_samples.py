"""Masks personal data in the samples that a command shows and logs, if preparation found some and left it in the data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from trainer.data.config import PrivacyConfig, PrivacyEngine, PrivacyMode

WeightedPiece = tuple[str, float]
"""A piece of a decoded sample, and the loss weight of its tokens: 0 for context, 1 for what is learned."""
MASK_NOTE = (
    "(personal data is masked in this sample; the model learns the text as it is, "
    "unless data.privacy.mode is redact, pseudonymise or drop)"
)
LEFT_OUT_NOTE = (
    "(no sample is shown: it may hold names that only data.privacy.engine=presidio finds; audit.html in the directory of "
    "the prepared data has samples in clear text)"
)
MaskPieces = Callable[[list[WeightedPiece]], list[WeightedPiece]]
"""Masks personal data in the pieces of one decoded sample."""


def has_reported_personal_data(report: dict[str, Any]) -> bool:
    """Whether preparation found personal data and left it in the data: `data.privacy.mode=report`.

    `report`: `Audit.report`. Reports of data without a search, and of earlier versions, say nothing: False.
    """
    privacy = report.get("privacy") or {}
    return privacy.get("mode") == PrivacyMode.report and bool(privacy.get("types"))


def samples_can_be_masked(privacy: PrivacyConfig) -> bool:
    """Whether samples can be masked at once: Presidio takes seconds and much memory to load, and may be missing on this host."""
    return privacy.engine == PrivacyEngine.patterns


def piece_masker(privacy: PrivacyConfig) -> MaskPieces:
    """Make the function that masks personal data in the pieces of one decoded sample, as the report masks it.

    "mail jane@example.com" becomes "mail j***@e***.com". What is looked for is what `privacy` asks for. A finding that goes over
    the end of a piece is masked in the piece in which it begins, and removed from the next.
    """
    from trainer.data.transforms.privacy.stage import PersonalDataFinder, mask

    finder = PersonalDataFinder(privacy)

    def mask_pieces(pieces: list[WeightedPiece]) -> list[WeightedPiece]:
        text = "".join(piece_text for piece_text, _ in pieces)
        findings = finder.find(text)
        masked_pieces = []
        piece_begin = 0
        for piece_text, weight in pieces:
            piece_end = piece_begin + len(piece_text)
            masked_text = ""
            position = piece_begin
            for finding in findings:
                if finding.end <= position or finding.start >= piece_end:
                    continue
                masked_text += text[position : max(finding.start, position)]
                if finding.start >= piece_begin:
                    masked_text += mask(finding.type, text[finding.start : finding.end])
                position = min(finding.end, piece_end)
            masked_pieces.append((masked_text + text[position:piece_end], weight))
            piece_begin = piece_end
        return masked_pieces

    return mask_pieces

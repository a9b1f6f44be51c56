"""What became of a setting that was left open: the state that a later start of the run reads, and the sentence that people read.

`config.yaml` keeps the fields, so that the wording of the sentence decides nothing. The first run directories keep the sentence
alone: `parse_resolution` takes both.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_EARLIER_SENTENCE_REGEX = re.compile(r"(?P<asked>\S+)(?: -> (?P<chosen>\S+))? \((?P<reasons>.*)\)", re.DOTALL)
"""A resolution as the first run directories have it: `auto -> 4 (planned; 16, 8 ran out of memory at step 3)`."""
_EARLIER_TRIAL_REGEX = re.compile(r"(?P<choices>\w+(?:, \w+)*) ran out of memory(?: at step (?P<step>\d+))?")


@dataclass(frozen=True, slots=True)
class OutOfMemoryTrial:
    """A choice with which the run ran out of memory."""

    choice: Any
    """What the setting was: a name or a number."""
    step: int | None = None
    """The step of training in which it happened; None if it was tried before training."""

    def __str__(self) -> str:
        text = f"{self.choice} ran out of memory"
        return text if self.step is None else f"{text} at step {self.step}"


@dataclass(frozen=True, slots=True)
class ResolvedSetting:
    """How a setting got its value. `str` gives the sentence for people; nothing reads that sentence back."""

    setting: str
    """Its full key, such as `batch.micro`."""
    asked: Any
    """What the user typed, or the default: `auto`, or a number with which memory ran out. None if nothing was asked."""
    chosen: Any = None
    """What the run has instead; None as long as nothing is chosen."""
    reason: str = ""
    tried: tuple[OutOfMemoryTrial, ...] = ()
    """Choices that did not fit, the earliest first."""

    def __str__(self) -> str:
        """For example `auto -> 4 (planned; 16 ran out of memory; 8 ran out of memory at step 3)`."""
        outcome = " -> ".join(str(value) for value in (self.asked, self.chosen) if value is not None)
        reasons = [str(trial) for trial in self.tried]
        if self.reason:
            reasons.insert(0, self.reason)
        return f"{outcome} ({'; '.join(reasons)})" if reasons else outcome


def parse_resolution(setting: str, recorded: Any) -> ResolvedSetting | None:
    """Read how a setting that was left open got its value (its resolution), in each form in which it was ever kept.

    None if `recorded` is no resolution. `recorded` is a ResolvedSetting; its fields as read from YAML or JSON, such as
    {"asked": "auto", "chosen": 4, "reason": "planned"}; or the sentence of an early run directory, such as "auto -> 4 (planned)".
    """
    if isinstance(recorded, ResolvedSetting):
        return recorded
    if isinstance(recorded, str):
        return _parse_earlier_sentence(setting, recorded)
    if not isinstance(recorded, Mapping) or "asked" not in recorded:
        return None
    trials = recorded.get("tried")
    if not isinstance(trials, list | tuple):
        trials = ()
    return ResolvedSetting(
        setting=setting,
        asked=recorded["asked"],
        chosen=recorded.get("chosen"),
        reason=str(recorded.get("reason") or ""),
        tried=tuple(map(_parse_trial, trials)),
    )


def _parse_trial(trial: Any) -> OutOfMemoryTrial:
    """Read a choice with which memory ran out, as a file holds it: {"choice": 16, "step": 3}, or the choice alone."""
    if not isinstance(trial, Mapping):
        return OutOfMemoryTrial(trial)
    step = trial.get("step")
    return OutOfMemoryTrial(trial.get("choice"), step if isinstance(step, int) else None)


def _parse_earlier_sentence(setting: str, sentence: str) -> ResolvedSetting | None:
    """Read a resolution that an earlier version wrote as a sentence; None for a sentence about something else.

    `auto -> 4 (planned; 16, 8 ran out of memory)` is asked=auto, chosen=4, reason=planned and two trials: each of the reasons
    in brackets is either choices that ran out of memory or anything else.
    """
    match = _EARLIER_SENTENCE_REGEX.fullmatch(sentence)
    if match is None:
        return None
    reasons = []
    tried: list[OutOfMemoryTrial] = []
    for reason in match["reasons"].split("; "):
        trial = _EARLIER_TRIAL_REGEX.fullmatch(reason)
        if trial is None:
            reasons.append(reason)
            continue
        step = None if trial["step"] is None else int(trial["step"])
        tried += [OutOfMemoryTrial(_as_int_or_text(choice), step) for choice in trial["choices"].split(", ")]
    return ResolvedSetting(
        setting,
        asked=_as_int_or_text(match["asked"]),
        chosen=_as_int_or_text(match["chosen"]),
        reason="; ".join(reasons),
        tried=tuple(tried),
    )


def _as_int_or_text(text: str | None) -> Any:
    """The number that a word of a sentence is, else the word itself; None stays None."""
    is_number = text is not None and text.isdecimal()
    return int(text) if is_number else text  # type: ignore[arg-type]

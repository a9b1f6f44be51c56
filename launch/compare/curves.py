"""Compares the loss curves of two runs: how far they differ, at which step, and whether they can be compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from launch.compare.run_files import RecordedRun

SAME_LOSS_TOLERANCE = 1e-5
"""Losses count as the same up to this relative difference over the first steps: every strategy promises that."""
FIRST_STEPS = 5
"""Steps over which the losses of two runs must agree to count as the same; rounding has not grown much by then."""
IDENTITY_KINDS = ("data", "order", "objective")
"""What must be the same for losses of the same step to be of the same documents and of the same kind."""


SPEED_SETTINGS = (
    *(
        "strategy",
        "parallel",
        "launcher",
        "logging",
        "profile",
        "checkpoint",
        "export",
        "evaluation",
        "batch.micro",
        "substitutions",
    ),
    *("model.attention", "model.keep_packed", "data.layout", "data.cache_dir", "data.workers", "data.verify"),
)
"""Settings that decide where and how fast a step is computed. They change no step, so the loss must stay the same."""


@dataclass(frozen=True, slots=True)
class LossDifference:
    """Relative differences of the losses of two runs, over the steps that both have."""

    early: float
    """The largest difference over the first five common steps."""
    early_step: int
    drift: float
    """The largest difference over all common steps."""
    drift_step: int
    steps: int
    """How many steps both runs have."""

    @property
    def same(self) -> bool:
        """Whether the first steps agree as strategies are promised to."""
        return self.early <= SAME_LOSS_TOLERANCE


def compare_losses(baseline: RecordedRun, run: RecordedRun) -> LossDifference | None:
    """How far the losses of `run` are from the baseline's, step by step; None if no step has a finite loss in both."""
    difference_by_step: dict[int, float] = {}
    for step in sorted(baseline.steps.keys() & run.steps.keys()):
        baseline_loss = baseline.steps[step]["loss"]
        loss = run.steps[step]["loss"]
        if baseline_loss is not None and loss is not None:
            difference_by_step[step] = _relative_difference(baseline_loss, loss)
    if not difference_by_step:
        return None
    # Rounding grows with the steps, so only the first ones can show that strategies compute the same.
    first_steps = list(difference_by_step)[:FIRST_STEPS]
    early_step = max(first_steps, key=difference_by_step.__getitem__)
    drift_step = max(difference_by_step, key=difference_by_step.__getitem__)
    return LossDifference(
        early=difference_by_step[early_step],
        early_step=early_step,
        drift=difference_by_step[drift_step],
        drift_step=drift_step,
        steps=len(difference_by_step),
    )


def _relative_difference(reference: float, value: float) -> float:
    """|reference - value| relative to the reference, or to the value if the reference is 0; 0 if both are."""
    scale = abs(reference) or abs(value) or 1.0
    return abs(reference - value) / scale


def rounded(difference: float) -> str:
    """A relative difference to one digit: `3e-7`, or `0` if there is none."""
    return f"{difference:.1g}".replace("e-0", "e-") if difference else "0"


def baseline_index(runs: list[RecordedRun], run_index: int, first: int) -> int | None:
    """Index of the run that the loss of run `run_index` is compared with. The first case that applies:

    - None for a run before `first`, which is the first run that took a step.
    - The earliest run that trains the same job with the same seed, so that two strategies of one method are compared.
    - Otherwise `first`.
    """
    if run_index < first:
        return None
    settings = step_settings(runs[run_index])
    for earlier_index in range(run_index):
        earlier = runs[earlier_index]
        if earlier.steps and step_settings(earlier) == settings:
            return earlier_index
    return first


def step_settings(run: RecordedRun) -> dict[str, Any]:
    """The settings that decide what is computed in a step, with the seed: two runs with equal ones must have equal losses."""
    return {key: value for key, value in run.config.items() if _decides_steps(key)}


def _decides_steps(key: str) -> bool:
    """Whether a setting, by dotted key, can change the loss; of `run.` only the seed can."""
    if key.startswith("run."):
        return key == "run.seed"
    return not any(key == prefix or key.startswith(f"{prefix}.") for prefix in SPEED_SETTINGS)


def first_step_not_finite(run: RecordedRun) -> int | None:
    """The first step whose loss was NaN or infinite (null in its row); None if every loss is a number."""
    for step, row in run.steps.items():
        if row["loss"] is None:
            return step
    return None


def why_not_comparable(baseline: RecordedRun, run: RecordedRun) -> list[str]:
    """Why the losses of two runs cannot be compared: their data, its order or the objective differs.

    A line `key: value and value` for each difference; empty if the losses can be compared. `identity.json` of the runs says it,
    or their settings if one of them has no such file.
    """
    if not baseline.identity or not run.identity:
        return _difference_lines(_identity_from_config(baseline), _identity_from_config(run))
    lines = []
    for kind in IDENTITY_KINDS:
        baseline_identity = baseline.identity.get(kind, {})
        identity = run.identity.get(kind, {})
        if kind == "data":
            if baseline_identity.get("fingerprint") == identity.get("fingerprint"):
                continue  # the prepared data is the same, so settings that differ had no effect on it
            baseline_identity = {**_data_settings(baseline), **baseline_identity}
            identity = {**_data_settings(run), **identity}
        lines += _difference_lines(baseline_identity, identity)
    return lines


def _data_settings(run: RecordedRun) -> dict[str, Any]:
    """The settings that say where the data came from: the identity itself has only a fingerprint of its content."""
    keys = ("data.path", "data.eval_path", "data.test_path", "model.path", "model.tokenizer", "model.chat_template")
    return {key: run.config.get(key) for key in keys}


def _identity_from_config(run: RecordedRun) -> dict[str, Any]:
    """The identity of a run that ended before it wrote `identity.json`: the settings that an identity is made of."""
    from trainer.config.tree import kind_of  # loads torch, which a comparison needs for such runs alone

    identity = {}
    if "data.path" in run.config:
        identity["data.path"] = run.config["data.path"]
    for key, value in run.config.items():
        try:
            if kind_of(key) in IDENTITY_KINDS:
                identity[key] = value
        except KeyError:  # a setting of another version
            continue
    return identity


def _difference_lines(baseline: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """A line `key: value and value` for each key of two identities whose values differ."""
    lines = []
    for key in sorted(baseline.keys() | other.keys()):
        baseline_value = baseline.get(key, "-")
        other_value = other.get(key, "-")
        if baseline_value != other_value:
            title = "prepared data" if key == "fingerprint" else key
            lines.append(f"{title}: {_shortened(baseline_value)} and {_shortened(other_value)}")
    return lines


def _shortened(value: Any) -> str:
    """A setting's value as text; a long one, such as a fingerprint, is cut after 12 characters."""
    value_text = str(value)
    return value_text if len(value_text) <= 40 else f"{value_text[:12]}..."

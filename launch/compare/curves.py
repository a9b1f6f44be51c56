"""Compares the loss curves of two runs: how far they differ, at which step, and whether they can be compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from launch.compare.names import is_below
from launch.compare.run_files import RecordedRun

SAME_LOSS_TOLERANCE = 1e-5
"""Losses count as the same up to this relative difference over the first steps: every strategy promises that."""
NUM_FIRST_STEPS = 5
"""Steps over which the losses of two runs must agree to count as the same; rounding has not grown much by then."""
IDENTITY_KINDS = ("data", "order", "objective")
"""What must be the same for losses of the same step to be of the same documents and of the same kind."""


LOSS_NEUTRAL_SETTINGS = (
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
    """How far the losses of a run are from those of its baseline: relative differences, over the steps that both have."""

    first_steps_difference: float
    """The largest difference over the first `NUM_FIRST_STEPS` common steps."""
    step_of_first_steps_difference: int
    """The step with this largest difference."""
    all_steps_difference: float
    """The largest difference over all common steps."""
    step_of_all_steps_difference: int
    """The step with this largest difference."""
    num_common_steps: int
    """How many steps have a loss in both runs."""

    @property
    def is_same_loss(self) -> bool:
        """Whether the losses of the first steps agree within `SAME_LOSS_TOLERANCE`, as every strategy promises."""
        return self.first_steps_difference <= SAME_LOSS_TOLERANCE

    def as_json(self) -> dict[str, float | int]:
        """The differences under the keys that `compare.json` has for a point's loss against that of its baseline.

        All are relative. `early`: the largest over the first common steps, at `early_step`. `drift`: the largest over all
        common steps. `steps`: how many are common. `same`: whether `early` is no more than rounding explains.
        """
        return {
            "early": self.first_steps_difference,
            "early_step": self.step_of_first_steps_difference,
            "drift": self.all_steps_difference,
            "drift_step": self.step_of_all_steps_difference,
            "steps": self.num_common_steps,
            "same": self.is_same_loss,
        }


def compare_losses(baseline: RecordedRun, run: RecordedRun) -> LossDifference | None:
    """Compare the loss curves of two runs step by step; None if no step has a finite loss in both.

    Two strategies that train the same must agree over the first steps; later, rounding grows.
    """
    difference_by_step: dict[int, float] = {}
    for step in sorted(baseline.steps.keys() & run.steps.keys()):
        baseline_loss = baseline.steps[step]["loss"]
        loss = run.steps[step]["loss"]
        if baseline_loss is not None and loss is not None:
            difference_by_step[step] = _relative_difference(baseline_loss, loss)
    if not difference_by_step:
        return None
    # Rounding grows with the steps, so only the first ones can show that strategies compute the same.
    first_steps = list(difference_by_step)[:NUM_FIRST_STEPS]
    step_of_first_steps_difference = max(first_steps, key=difference_by_step.__getitem__)
    step_of_all_steps_difference = max(difference_by_step, key=difference_by_step.__getitem__)
    return LossDifference(
        first_steps_difference=difference_by_step[step_of_first_steps_difference],
        step_of_first_steps_difference=step_of_first_steps_difference,
        all_steps_difference=difference_by_step[step_of_all_steps_difference],
        step_of_all_steps_difference=step_of_all_steps_difference,
        num_common_steps=len(difference_by_step),
    )


def _relative_difference(reference: float, value: float) -> float:
    """The relative difference |reference - value| / |reference|. If the reference is 0: 1 for any other value, 0 for 0."""
    scale = abs(reference) or abs(value) or 1.0
    return abs(reference - value) / scale


def format_difference(difference: float) -> str:
    """A relative difference with one significant digit, as text: 3.2e-07 -> `3e-7`, 0.0 -> `0`."""
    return f"{difference:.1g}".replace("e-0", "e-") if difference else "0"


def baseline_index(runs: list[RecordedRun], run_index: int, default_index: int) -> int | None:
    """Choose the run whose loss is compared with that of run `run_index`; returns its index. The first case that applies:

    - `run_index` is before `default_index` (that of the first run that took a step): None.
    - An earlier run trains the same job (equal settings that can change the loss) with the same seed: the earliest, so that
      strategies of one job are compared.
    - Otherwise: `default_index`, also for the run at `default_index` itself; callers leave that one out.
    """
    if run_index < default_index:
        return None
    settings = loss_relevant_settings(runs[run_index])
    for earlier_index in range(run_index):
        earlier_run = runs[earlier_index]
        if earlier_run.steps and loss_relevant_settings(earlier_run) == settings:
            return earlier_index
    return default_index


def loss_relevant_settings(run: RecordedRun) -> dict[str, Any]:
    """The settings of a run that can change its losses, by dotted key, with the seed: they define the job that it trains.

    Two runs with equal such settings must have equal losses: they differ at most in strategy, launcher, logging and the
    like.
    """
    return {key: value for key, value in run.config.items() if _can_change_loss(key)}


def _can_change_loss(key: str) -> bool:
    """Whether the setting with this dotted key can change the loss. Of the group `run`, only the seed can."""
    if key.startswith("run."):
        return key == "run.seed"
    return not is_below(key, LOSS_NEUTRAL_SETTINGS)


def first_non_finite_loss_step(run: RecordedRun) -> int | None:
    """The first step whose loss was NaN or infinite; None if every loss is finite."""
    for step, row in run.steps.items():
        if row["loss"] is None:  # metrics.jsonl has null for NaN and infinity
            return step
    return None


@dataclass(frozen=True, slots=True)
class IncomparableSetting:
    """A setting because of which the losses of two runs cannot be compared."""

    setting: str
    """Its dotted key, or `prepared data`."""
    values_text: str
    """Its values in the baseline and in the run, such as `a.jsonl and b.jsonl`."""

    def __str__(self) -> str:
        return f"{self.setting}: {self.values_text}"


def find_incomparable_settings(baseline: RecordedRun, run: RecordedRun) -> list[IncomparableSetting]:
    """Find out why the losses of two runs cannot be compared: differences of their data, its order or the objective.

    Empty if they can be compared. A run records in `identity.json` what decides these three (`IDENTITY_KINDS`). If one of
    the runs has no such file, their settings are compared instead.
    """
    if not baseline.identity or not run.identity:
        return _differing_values(_identity_from_config(baseline), _identity_from_config(run))
    differences = []
    for kind in IDENTITY_KINDS:
        baseline_identity = baseline.identity.get(kind, {})
        run_identity = run.identity.get(kind, {})
        if kind == "data":
            if baseline_identity.get("fingerprint") == run_identity.get("fingerprint"):
                continue  # the prepared data is the same, so settings that differ had no effect on it
            # The data differs; the paths that it came from say more about it than the fingerprint.
            baseline_identity = {**_data_source_settings(baseline), **baseline_identity}
            run_identity = {**_data_source_settings(run), **run_identity}
        differences += _differing_values(baseline_identity, run_identity)
    return differences


def _data_source_settings(run: RecordedRun) -> dict[str, Any]:
    """The settings that say where a run's data came from, since its fingerprint in `identity.json` tells a reader nothing."""
    keys = ("data.path", "data.eval_path", "data.test_path", "model.path", "model.tokenizer", "model.chat_template")
    return {key: run.config.get(key) for key in keys}


def _identity_from_config(run: RecordedRun) -> dict[str, Any]:
    """Collect from a run's settings what its `identity.json` would hold, for a run that ended before it wrote that file.

    Returns {dotted key: value} of the settings whose change would change the data, its order or the objective; each setting
    declares that itself.
    """
    from trainer.config.tree import change_kind_of_setting  # loads torch, which a comparison needs for such runs alone

    identity = {}
    if "data.path" in run.config:
        identity["data.path"] = run.config["data.path"]
    for key, value in run.config.items():
        try:
            if change_kind_of_setting(key) in IDENTITY_KINDS:
                identity[key] = value
        except KeyError:  # a setting that only another version of shardtune has
            continue
    return identity


def _differing_values(baseline_identity: dict[str, Any], run_identity: dict[str, Any]) -> list[IncomparableSetting]:
    """Compare two identities, {key: value} of what data, order or objective was made of: the keys with different values.

    The value of a key that is missing in one of them is `-`.
    """
    differences = []
    for key in sorted(baseline_identity.keys() | run_identity.keys()):
        baseline_value = baseline_identity.get(key, "-")
        run_value = run_identity.get(key, "-")
        if baseline_value != run_value:
            # The key of the hash of all prepared documents.
            setting = "prepared data" if key == "fingerprint" else key
            values_text = f"{_shortened_value(baseline_value)} and {_shortened_value(run_value)}"
            differences.append(IncomparableSetting(setting, values_text))
    return differences


def _shortened_value(value: Any) -> str:
    """The value of a setting as text. A text of more than 40 characters, such as a fingerprint, is cut after 12."""
    value_text = str(value)
    return value_text if len(value_text) <= 40 else f"{value_text[:12]}..."

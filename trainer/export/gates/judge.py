"""Judges the gates of a model: compares each bound with what was measured of exactly these weights."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from strategies.errors import ShardtuneError
from strategies.runtime import Runtime, broadcast_object
from trainer.checkpoints.manifest import manifest_sha256_at_step
from trainer.export.gates.bounds import OVERRIDE, Bound, bounds_of
from trainer.export.gates.measured import FORGETTING, MeasuredMetric, matching_metrics, measured_metrics
from trainer.reporting.results import TEST_REPORT, add_to_run_record, read_json_or_empty

MAX_LISTED_METRICS = 12
"""Most metrics that are listed if a gate names none of them."""


class GateRefused(ShardtuneError):
    """A gate of the run is not passed."""

    exit_code = 69


@dataclass(frozen=True, slots=True)
class Weights:
    """The weights that are to be exported."""

    run_dir: Path
    step: int | None
    """The step of the run that they are from."""
    artefact: str | None
    """SHA-256 of the checkpoint's manifest; None if there is no checkpoint of that step."""


@dataclass(frozen=True, slots=True)
class GateVerdict:
    """The verdict on one gate. The names of the fields are keys of `run.json`."""

    metric: str
    bound: str
    """As the user wrote it."""
    passed: bool
    value: float | None
    where: str
    """Where it was measured; empty if it never was."""
    says: str
    """The verdict in words, for the screen."""


@dataclass(slots=True)
class JudgedGates:
    """The verdicts on all gates of some weights."""

    verdicts: list[GateVerdict] = field(default_factory=list)
    override: str | None = None
    """Why the export goes on although gates are not passed; None if it does not."""

    @property
    def refused(self) -> list[str]:
        """The gates that are not passed, a line each."""
        return [verdict.says for verdict in self.verdicts if not verdict.passed]

    def refusal_text(self, run_dir: Path) -> str:
        """What a run prints at its end if gates are not passed."""
        lines = "\n".join(f"  {line}" for line in self.refused)
        if self.override is not None:
            return f"gates say no, and are passed over ({self.override}):\n{lines}"
        return f"not exported, since gates say no:\n{lines}\nthen: shardtune export {run_dir}"

    def record(self) -> dict[str, Any]:
        """As JSON values."""
        gates = [asdict(verdict) for verdict in self.verdicts]
        return {"gates": gates, "override": self.override if self.refused else None}


def weights_at(run_dir: Path, step: int, fallback_dir: str | None) -> Weights:
    """The weights of a run at a step. Errors: StorageError if its checkpoints cannot be listed."""
    return Weights(run_dir, step, manifest_sha256_at_step(run_dir, step, fallback_dir))


def judge_at_end(
    gates: Mapping[str, Any],
    tasks: Mapping[str, Any],
    *,
    run_dir: Path,
    step: int,
    fallback_dir: str | None,
    runtime: Runtime,
) -> JudgedGates:
    """`judge` the weights that a run ends with at `step`, alike on every rank. All ranks must call if there are gates."""
    if not gates:
        return JudgedGates()
    judged = JudgedGates()
    if runtime.is_main:
        judged = judge(gates, weights_at(run_dir, step, fallback_dir), tasks)
    return broadcast_object(judged, runtime)


def judge(gates: Mapping[str, Any], weights: Weights, tasks: Mapping[str, Any]) -> JudgedGates:
    """Judge each gate; `tasks` are those of the run's configuration, by name. Reads the run's records."""
    metrics = []
    if gates:
        metrics = measured_metrics(weights.run_dir, weights.step, weights.artefact)
    verdicts = [_verdict(bound, metrics, weights, tasks) for bound in bounds_of(gates)]
    return JudgedGates(verdicts, gates.get(OVERRIDE))


def _verdict(bound: Bound, metrics: list[MeasuredMetric], weights: Weights, tasks: Mapping[str, Any]) -> GateVerdict:
    """The verdict on one gate. `metrics` are all that the run has measured, of these weights and of others.

    - measured of these weights: by the values.
    - measured of other weights only, or never: not passed, with the command that measures it.
    """
    own_metrics = [metric for metric in metrics if metric.of_these_weights]
    matched = matching_metrics(bound.metric, own_metrics)
    if matched:
        return _verdict_on(bound, matched)
    command = _measuring_command(bound.metric, weights, tasks)
    metrics_of_other_weights = matching_metrics(bound.metric, metrics)
    if metrics_of_other_weights:
        newest = metrics_of_other_weights[0]
        text = (
            f"{bound.metric}: {newest.value:.4g} in the {newest.where} belongs to other weights than {_weights_name(weights)} "
            f"and does not count; {command}"
        )
        return GateVerdict(bound.metric, bound.text, False, None, "", text)
    names = list(dict.fromkeys(metric.name for metric in own_metrics))
    similar = difflib.get_close_matches(bound.metric.removeprefix("eval/"), names, n=1)
    hint = ""
    if similar:
        hint = f"; did you mean {similar[0]}?"
    elif names:
        hint = f"; measured are {', '.join(names[:MAX_LISTED_METRICS])}"
    text = f"{bound.metric}: {bound}, and was never measured: {command}{hint}"
    return GateVerdict(bound.metric, bound.text, False, None, "", text)


def _verdict_on(bound: Bound, matched: list[MeasuredMetric]) -> GateVerdict:
    """The verdict on a gate by the metrics that its name stands for: all must keep the bound, and the worst one is reported.

    Its text: `loss: 2.3 (qa/loss), must be below 2.1; <where it was measured>`.
    """
    worst = max(matched, key=lambda metric: bound.badness(metric.value))
    passed = all(bound.holds(metric.value) for metric in matched)
    if math.isnan(worst.value):
        reported_value = None
        measured_text = "has no value"
    else:
        reported_value = worst.value
        measured_text = f"{worst.value:.4g}{_interval_text(worst)}"
    is_called_otherwise = worst.name not in (bound.metric, bound.metric.removeprefix("eval/"))
    full_name = f" ({worst.name})" if is_called_otherwise else ""
    text = f"{bound.metric}: {measured_text}{full_name}, {bound}; {worst.where}"
    return GateVerdict(bound.metric, bound.text, passed, reported_value, worst.where, text)


def _interval_text(metric: MeasuredMetric) -> str:
    """The confidence interval of a metric behind its value, such as ` [0.1, 0.3]`; empty if it has none."""
    if metric.low is None or metric.high is None:
        return ""
    return f" [{metric.low:.4g}, {metric.high:.4g}]"


def _weights_name(weights: Weights) -> str:
    """What a verdict calls the weights that are to be exported."""
    if weights.step is None:
        return "these"
    return f"step {weights.step}"


def _measuring_command(metric: str, weights: Weights, tasks: Mapping[str, Any]) -> str:
    """The command that measures a gate's metric of the weights, with `<...>` where the user has to fill something in.

    By the part of the metric's name before a slash (`eval/` aside); the first case that holds:
    - `review`, the test split or `FORGETTING`: the command for that.
    - a task of the run (`tasks`, by name): `evaluate`.
    - a kind of task that needs no file, or the first metric of one: `evaluate` with that kind.
    - else: `evaluate` with a task that is still to be set up.
    """
    run = weights.run_dir
    checkpoint = "" if weights.step is None else f" checkpoint={weights.step}"
    # The metric of a gate begins with its task, its kind or its own name, and may go on after a slash: summaries/rouge_l.
    first, _, below = metric.removeprefix("eval/").partition("/")
    if first == "review":
        return f"shardtune review make {run} prompts=<file>, then shardtune review score {run} <answers>"
    if first == TEST_REPORT:
        return f"shardtune evaluate {run}{checkpoint} split=test"
    if first in tasks:
        return f"shardtune evaluate {run}{checkpoint}"
    if first == FORGETTING:
        return (
            f"shardtune evaluate {run}{checkpoint} against=base evaluation.tasks.general.kind=loss "
            "evaluation.tasks.general.path=<general text>"
        )
    from trainer.evaluation.tasks.registry import TASK_KINDS

    kind = None
    if first in TASK_KINDS:
        kind = first
    else:
        # The metric may stand for the kind whose first metric it is.
        for name, task in TASK_KINDS.items():
            if task.metrics and task.metrics[0].name == first:
                kind = name
                break
    if kind is not None and not TASK_KINDS[kind].needs_path:
        return f"shardtune evaluate {run}{checkpoint} evaluation.tasks=[{kind}]"
    # What the gate says before the slash is taken for the name of a task that is still to be set up.
    name = first if below or kind is None else "NAME"
    return (
        f"shardtune evaluate {run}{checkpoint} evaluation.tasks.{name}.kind={kind or '<kind>'} "
        f"evaluation.tasks.{name}.path=<file>"
    )


def refuse_failed_gates(gates: JudgedGates, checkpoint: str) -> None:
    """Raise GateRefused with every gate that is not passed, unless the user overrides them. `checkpoint` names the weights."""
    if gates.refused and gates.override is None:
        lines = "\n  ".join(gates.refused)
        raise GateRefused(
            f"{checkpoint}: {len(gates.refused)} of {len(gates.verdicts)} gates say no\n  {lines}\n"
            f'To export all the same, and have the reason recorded: gates.{OVERRIDE}="<why>"'
        )


def record_gate_decision(run_dir: Path, gates: JudgedGates, export_entry: dict[str, Any]) -> None:
    """Add the gates' decision about an export to the list `exports` in the run's `run.json`.

    `export_entry`: which export it was, as JSON values. Raises StorageError if the file cannot be written.
    """
    earlier_exports = read_json_or_empty(run_dir / "run.json").get("exports") or []
    add_to_run_record(run_dir, "exports", [*earlier_exports, {**export_entry, **gates.record()}])

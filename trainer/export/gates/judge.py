"""Judges the gates of a model: compares each bound with what was measured of exactly these weights."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from strategies import exit_codes
from strategies.errors import ShardtuneError
from strategies.runtime import Runtime, broadcast_object
from trainer.checkpoints.manifest import manifest_sha256_at_step
from trainer.export.gates.bounds import OVERRIDE_KEY, Bound, parse_gate_bounds
from trainer.export.gates.measured import FORGETTING_METRIC, MeasuredMetric, matching_metrics, measured_metrics
from trainer.reporting.results import TEST_REPORT, add_to_run_record
from trainer.reporting.status import read_json_or_empty

MAX_LISTED_METRICS = 12
"""Most metrics that are listed if a gate names none of them."""


class GateRefused(ShardtuneError):
    """A gate of the run failed, so that nothing is exported."""

    exit_code = exit_codes.CHECK_FAILED


@dataclass(frozen=True, slots=True)
class ExportedWeights:
    """Which weights of a run are to be exported."""

    run_dir: Path
    step: int | None
    """The step of the run that they are from."""
    manifest_sha256: str | None
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
    """The user's reason to export although gates failed (`gates.override`); None without one."""

    @property
    def failed_gate_lines(self) -> list[str]:
        """One line for each gate that failed, such as `eval/loss: 2.3, must be below 2.1; <where it was measured>`."""
        return [verdict.says for verdict in self.verdicts if not verdict.passed]

    def failed_gates_text(self, run_dir: Path) -> str:
        """What a run prints at its end if gates failed: which ones, and that it is not exported, or the reason to export it."""
        lines = "\n".join(f"  {line}" for line in self.failed_gate_lines)
        count_text = f"{len(self.failed_gate_lines)} of {len(self.verdicts)} gates failed"
        if self.override is not None:
            return f"exported although {count_text} (gates.{OVERRIDE_KEY}={self.override}):\n{lines}"
        return f"not exported, since {count_text}:\n{lines}\nthen: shardtune export {run_dir}"

    def as_json(self) -> dict[str, Any]:
        """The verdicts and the reason of an override as JSON values, for `run.json`."""
        gates = [asdict(verdict) for verdict in self.verdicts]
        return {"gates": gates, "override": self.override if self.failed_gate_lines else None}


def exported_weights_at(run_dir: Path, step: int, fallback_dir: str | None) -> ExportedWeights:
    """The weights of a run at a step. Errors: StorageError if its checkpoints cannot be listed."""
    sha256 = manifest_sha256_at_step(run_dir, step, fallback_dir)
    return ExportedWeights(run_dir=run_dir, step=step, manifest_sha256=sha256)


def judge_at_end(
    gates: Mapping[str, Any],
    tasks: Mapping[str, Any],
    *,
    run_dir: Path,
    step: int,
    fallback_dir: str | None,
    runtime: Runtime,
) -> JudgedGates:
    """Judge the gates for the weights that a run ends with at `step`, before they are exported; alike on every rank.

    A gate is a bound on a metric that weights must keep to be exported. `gates`: bound by metric, such as {"eval/loss":
    "<2.1"}. `tasks`: the evaluation tasks of the run, by name. All ranks must call if there are gates.
    """
    if not gates:
        return JudgedGates()
    judged = JudgedGates()
    if runtime.is_main:
        judged = judge_gates_of_weights(gates, exported_weights_at(run_dir, step, fallback_dir), tasks)
    return broadcast_object(judged, runtime)


def judge_gates_of_weights(gates: Mapping[str, Any], weights: ExportedWeights, tasks: Mapping[str, Any]) -> JudgedGates:
    """Judge each gate by what the run has measured of these weights, from the reports and metrics in its directory.

    `gates`: bound by metric, such as {"eval/loss": "<2.1"}, and `override` with the reason to export all the same. `tasks`:
    the evaluation tasks of the run's configuration, by name.
    """
    metrics = []
    if gates:  # else nothing is read
        metrics = measured_metrics(weights.run_dir, weights.step, weights.manifest_sha256)
    verdicts = [_judge_gate(bound, metrics, weights, tasks) for bound in parse_gate_bounds(gates)]
    return JudgedGates(verdicts=verdicts, override=gates.get(OVERRIDE_KEY))


def _judge_gate(
    bound: Bound, metrics: list[MeasuredMetric], weights: ExportedWeights, tasks: Mapping[str, Any]
) -> GateVerdict:
    """Judge one gate. `metrics`: all that the run has measured, of these weights and of others, newest first.

    - The metric was measured of these weights: the verdict is by its values.
    - It was measured of other weights only: the gate fails, with the command that measures it.
    - It was never measured: the gate fails, with that command, and the names of similar or of some measured metrics.
    """
    own_metrics = [metric for metric in metrics if metric.is_of_these_weights]
    matched = matching_metrics(bound.metric, own_metrics)
    if matched:
        return _verdict_by_metrics(bound, matched)
    # For the user to measure what is missing.
    command = _measuring_command(bound.metric, weights, tasks)
    metrics_of_other_weights = matching_metrics(bound.metric, metrics)
    if metrics_of_other_weights:
        newest = metrics_of_other_weights[0]
        text = (
            f"{bound.metric}: {newest.value:.4g} in the {newest.source} belongs to other weights than {_weights_name(weights)} "
            f"and does not count; {command}"
        )
        return _failed_without_value(bound, text)
    hint = _hint_at_measured_metrics(bound.metric, own_metrics)
    text = f"{bound.metric}: {bound}, and was never measured: {command}{hint}"
    return _failed_without_value(bound, text)


def _hint_at_measured_metrics(gate_name: str, measured: list[MeasuredMetric]) -> str:
    """A hint for a gate whose metric was never measured: a similar name, else some names that were; "" without any."""
    names = list(dict.fromkeys(metric.name for metric in measured))
    similar = difflib.get_close_matches(gate_name.removeprefix("eval/"), names, n=1)
    if similar:
        return f"; did you mean {similar[0]}?"
    if names:
        return f"; measured are {', '.join(names[:MAX_LISTED_METRICS])}"
    return ""


def _failed_without_value(bound: Bound, says: str) -> GateVerdict:
    """The verdict on a gate whose metric was not measured of these weights. `says`: the verdict in words."""
    return GateVerdict(metric=bound.metric, bound=bound.text, passed=False, value=None, where="", says=says)


def _verdict_by_metrics(bound: Bound, matched: list[MeasuredMetric]) -> GateVerdict:
    """Judge a gate by the metrics that its name stands for: all must keep the bound, and the worst one is reported.

    `loss` may stand for the loss of every task. A metric without a value (NaN) is the worst. The text: `loss: 2.3 (qa/loss),
    must be below 2.1; <where it was measured>`.
    """
    worst = max(matched, key=lambda metric: bound.badness(metric.value))
    passed = all(bound.holds(metric.value) for metric in matched)
    if math.isnan(worst.value):
        reported_value = None
        measured_text = "has no value"
    else:
        reported_value = worst.value
        measured_text = f"{worst.value:.4g}{_interval_text(worst)}"
    # A gate may name a metric in short, such as `loss` for `qa/loss`: then the full name is shown too.
    gate_has_other_name = worst.name not in (bound.metric, bound.metric.removeprefix("eval/"))
    full_name = f" ({worst.name})" if gate_has_other_name else ""
    text = f"{bound.metric}: {measured_text}{full_name}, {bound}; {worst.source}"
    return GateVerdict(
        metric=bound.metric,
        bound=bound.text,
        passed=passed,
        value=reported_value,
        where=worst.source,
        says=text,
    )


def _interval_text(metric: MeasuredMetric) -> str:
    """The confidence interval of a metric behind its value, such as ` [0.1, 0.3]`; empty if it has none."""
    if metric.low is None or metric.high is None:
        return ""
    return f" [{metric.low:.4g}, {metric.high:.4g}]"


def _weights_name(weights: ExportedWeights) -> str:
    """What a verdict calls the weights that are to be exported."""
    if weights.step is None:
        return "these"
    return f"step {weights.step}"


def _measuring_command(metric: str, weights: ExportedWeights, tasks: Mapping[str, Any]) -> str:
    """The command by which the user measures a gate's metric of the weights, with `<...>` where something is to be filled in.

    By the part of the metric's name before a slash (`eval/` aside); the first case that holds:
    - `review`, the test split or `FORGETTING_METRIC`: the command for that.
    - a task of the run (`tasks`, by name): `evaluate`.
    - a kind of task that needs no file, or the first metric of one: `evaluate` with that kind.
    - else: `evaluate` with a task that is still to be set up.
    """
    run = weights.run_dir
    checkpoint = "" if weights.step is None else f" checkpoint={weights.step}"
    # Such as `summaries/rouge_l`: before the slash stands the metric's task or kind, or its own name without a slash.
    name_before_slash, _, name_after_slash = metric.removeprefix("eval/").partition("/")
    if name_before_slash == "review":
        return f"shardtune review make {run} prompts=<file>, then shardtune review score {run} <answers>"
    if name_before_slash == TEST_REPORT:
        return f"shardtune evaluate {run}{checkpoint} split=test"
    if name_before_slash in tasks:
        return f"shardtune evaluate {run}{checkpoint}"
    if name_before_slash == FORGETTING_METRIC:
        return (
            f"shardtune evaluate {run}{checkpoint} against=base evaluation.tasks.general.kind=loss "
            "evaluation.tasks.general.path=<general text>"
        )
    from trainer.evaluation.tasks.registry import TASK_KINDS

    kind = _task_kind_of(name_before_slash)
    if kind is not None and not TASK_KINDS[kind].needs_path:
        return f"shardtune evaluate {run}{checkpoint} evaluation.tasks=[{kind}]"
    # What stands before the slash is taken for the name of a task that the user still has to set up. A kind's metric alone, such
    # as `accuracy`, names none: the user chooses one in place of NAME.
    name = name_before_slash if name_after_slash or kind is None else "NAME"
    return (
        f"shardtune evaluate {run}{checkpoint} evaluation.tasks.{name}.kind={kind or '<kind>'} "
        f"evaluation.tasks.{name}.path=<file>"
    )


def _task_kind_of(name: str) -> str | None:
    """Which kind of task measures what is called `name`: that of this name, or the first with such a first metric, or None."""
    from trainer.evaluation.tasks.registry import TASK_KINDS

    if name in TASK_KINDS:
        return name
    for kind, task in TASK_KINDS.items():
        if task.metrics and task.metrics[0].name == name:
            return kind
    return None


def raise_if_gates_failed(gates: JudgedGates, checkpoint: str) -> None:
    """Refuse an export whose gates failed, with a line for each, unless the user overrides them. Raises GateRefused.

    `checkpoint`: name of the exported checkpoint, for the message.
    """
    if gates.failed_gate_lines and gates.override is None:
        lines = "\n  ".join(gates.failed_gate_lines)
        raise GateRefused(
            f"{checkpoint}: {len(gates.failed_gate_lines)} of {len(gates.verdicts)} gates failed\n  {lines}\n"
            f'To export all the same, and have the reason recorded: gates.{OVERRIDE_KEY}="<why>"'
        )


def record_gate_decision(run_dir: Path, gates: JudgedGates, export_entry: dict[str, Any]) -> None:
    """Add the gates' decision about an export to the list `exports` in the run's `run.json`.

    `export_entry`: which export it was, as JSON values. Raises StorageError if the file cannot be written.
    """
    earlier_exports = read_json_or_empty(run_dir / "run.json").get("exports") or []
    add_to_run_record(run_dir, "exports", [*earlier_exports, {**export_entry, **gates.as_json()}])

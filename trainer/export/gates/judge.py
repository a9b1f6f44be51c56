"""Judges the gates of a model: each bound against what was measured of these very weights."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from strategies.errors import ShardtuneError
from strategies.runtime import Runtime, broadcast_object
from trainer.checkpoints.manifest import artefact_of
from trainer.export.gates.bounds import OVERRIDE, Bound, bounds_of
from trainer.export.gates.measured import FORGETTING, MeasuredMetric, matching, measured
from trainer.reporting.results import add_to_run_record, read_json

LISTED = 12
"""Metrics listed, where a gate names none of them."""


class GateRefused(ShardtuneError):
    """A gate of the run says no."""

    exit_code = 69


@dataclass(frozen=True, slots=True)
class Weights:
    """What is to be given to others."""

    run_dir: Path
    step: int | None
    """At which step of the run they are as they are."""
    artefact: str | None
    """SHA-256 of the checkpoint's manifest; None where there is no checkpoint of that step."""


@dataclass(frozen=True, slots=True)
class GateVerdict:
    """One gate, judged."""

    metric: str
    bound: str
    """As it was written."""
    passed: bool
    value: float | None
    where: str
    """Where it was measured; empty where it never was."""
    says: str


@dataclass(slots=True)
class JudgedGates:
    """All gates of some weights."""

    verdicts: list[GateVerdict] = field(default_factory=list)
    override: str | None = None
    """Why they are passed over."""

    @property
    def refused(self) -> list[str]:
        """Each reason for a no, one line each."""
        return [each.says for each in self.verdicts if not each.passed]

    def told(self, run_dir: Path) -> str:
        """What a run says at its end of gates that say no."""
        lines = "\n".join(f"  {line}" for line in self.refused)
        if self.override is not None:
            return f"gates say no, and are passed over ({self.override}):\n{lines}"
        return f"not exported, since gates say no:\n{lines}\nthen: shardtune export {run_dir}"

    def record(self) -> dict[str, Any]:
        """As JSON values."""
        return {"gates": [asdict(each) for each in self.verdicts], "override": self.override if self.refused else None}


def weights_at(run_dir: Path, step: int, fallback_dir: str | None) -> Weights:
    """The weights of a run at a step. Errors: StorageError where its checkpoints cannot be listed."""
    return Weights(run_dir, step, artefact_of(run_dir, step, fallback_dir))


def judged_at_end(
    gates: Mapping[str, Any], at: tuple[Path, int, str | None], tasks: Mapping[str, Any], runtime: Runtime
) -> JudgedGates:
    """`judge` of `weights_at(*at)`, the same on every rank. All ranks must call where there are gates."""
    if not gates:
        return JudgedGates()
    return broadcast_object(judge(gates, weights_at(*at), tasks) if runtime.is_main else JudgedGates(), runtime)


def judge(gates: Mapping[str, Any], weights: Weights, tasks: Mapping[str, Any]) -> JudgedGates:
    """Judge each gate; `tasks` are those of the run's configuration, by name. Reads the run's records."""
    found = measured(weights.run_dir, weights.step, weights.artefact) if gates else []
    verdicts = [_verdict(bound, found, weights, tasks) for bound in bounds_of(gates)]
    return JudgedGates(verdicts, gates.get(OVERRIDE))


def _verdict(bound: Bound, found: list[MeasuredMetric], weights: Weights, tasks: Mapping[str, Any]) -> GateVerdict:
    mine = [each for each in found if each.mine]
    if matched := matching(bound.metric, mine):
        worst = max(matched, key=lambda each: bound.worse(each.value))
        passed = all(bound.holds(each.value) for each in matched)
        said = "has no value" if math.isnan(worst.value) else f"{worst.value:.4g}{_span(worst)}"
        called = "" if worst.name in (bound.metric, bound.metric.removeprefix("eval/")) else f" ({worst.name})"
        text = f"{bound.metric}: {said}{called}, {bound}; {worst.where}"
        return GateVerdict(
            bound.metric, bound.text, passed, None if math.isnan(worst.value) else worst.value, worst.where, text
        )
    how = _command(bound.metric, weights, tasks)
    if others := matching(bound.metric, found):
        other = others[0]
        text = (
            f"{bound.metric}: {other.value:.4g} in the {other.where} belongs to other weights than {_named(weights)} and does "
            f"not count; {how}"
        )
        return GateVerdict(bound.metric, bound.text, False, None, "", text)
    there = list(dict.fromkeys(each.name for each in mine))
    near = difflib.get_close_matches(bound.metric.removeprefix("eval/"), there, n=1)
    known = f"; did you mean {near[0]}?" if near else f"; measured are {', '.join(there[:LISTED])}" if there else ""
    return GateVerdict(
        bound.metric, bound.text, False, None, "", f"{bound.metric}: {bound}, and was never measured: {how}{known}"
    )


def _span(each: MeasuredMetric) -> str:
    return "" if each.low is None or each.high is None else f" [{each.low:.4g}, {each.high:.4g}]"


def _named(weights: Weights) -> str:
    return "these" if weights.step is None else f"step {weights.step}"


def _command(metric: str, weights: Weights, tasks: Mapping[str, Any]) -> str:
    """The words that measure it."""
    run = weights.run_dir
    checkpoint = "" if weights.step is None else f" checkpoint={weights.step}"
    first, _, rest = metric.removeprefix("eval/").partition("/")
    if first == "review":
        return f"shardtune review make {run} prompts=<file>, then shardtune review score {run} <answers>"
    if first in tasks:
        return f"shardtune evaluate {run}{checkpoint}"
    if first == FORGETTING:
        return (
            f"shardtune evaluate {run}{checkpoint} against=base evaluation.tasks.general.kind=loss "
            "evaluation.tasks.general.path=<general text>"
        )
    from trainer.evaluation.tasks.registry import TASK_KINDS

    kind = (
        first
        if first in TASK_KINDS
        else next(
            (name for name, kind in TASK_KINDS.items() if (first,) == tuple(each.name for each in kind.metrics[:1])),
            None,
        )
    )
    if kind is not None and not TASK_KINDS[kind].needs_path:
        return f"shardtune evaluate {run}{checkpoint} evaluation.tasks=[{kind}]"
    name = first if rest or kind is None else "NAME"
    return (
        f"shardtune evaluate {run}{checkpoint} evaluation.tasks.{name}.kind={kind or '<kind>'} "
        f"evaluation.tasks.{name}.path=<file>"
    )


def refuse(judged: JudgedGates, what: str) -> None:
    """Raise GateRefused with every reason, unless they are passed over."""
    if judged.refused and judged.override is None:
        lines = "\n  ".join(judged.refused)
        raise GateRefused(
            f"{what}: {len(judged.refused)} of {len(judged.verdicts)} gates say no\n  {lines}\n"
            f'To export all the same, and have the reason recorded: gates.{OVERRIDE}="<why>"'
        )


def record(run_dir: Path, judged: JudgedGates, about: dict[str, Any]) -> None:
    """Add what was decided about an export to the run's `run.json`. Errors: StorageError."""
    before = read_json(run_dir / "run.json").get("exports") or []
    add_to_run_record(run_dir, "exports", [*before, {**about, **judged.record()}])

"""Which point of a comparison to take: for the best quality, the most speed and the least memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from launch.compare.quality import RankedJobs, point_has_diverged
from trainer.reporting.numbers import readable
from trainer.reporting.status import State

if TYPE_CHECKING:
    from launch.compare.compared_point import ComparedPoint

MEMORY_TOLERANCE = 0.05
"""Relative difference of memory up to which two points count as equal; beyond it, repeats say it themselves."""
CPU_MEMORY_TOLERANCE = 0.15
"""The same on a CPU, where the resident set of the process has its libraries in it."""
FEW_SPEED_STEPS = 5
"""Steps behind the first logging interval below which a median speed decides nothing."""
MAX_NAMES = 4
"""Names that a sentence lists; of more it tells how many there are."""


@dataclass(frozen=True, slots=True)
class Recommendation:
    """A point to take for a goal of the reader's."""

    goal: str
    """Such as `the least memory`."""
    point: ComparedPoint
    why: str
    """The point's number, and which points are not shown to differ from it, such as `3.1 GiB; no difference shown from b`."""
    arguments: str
    """The settings to paste behind `shardtune train`; empty if the points differ in none."""


@dataclass(frozen=True, slots=True)
class _Extreme:
    """The point with the best value of a cost, and those that are not shown to differ from it."""

    point: ComparedPoint
    equals: list[ComparedPoint]
    is_shown: bool
    """Whether any point is shown to be worse."""


def is_recommendable(point: ComparedPoint) -> bool:
    """Whether a point is done and did not diverge. Only such points are recommended, or marked as best."""
    return is_done(point) and not point_has_diverged(point)


def is_done(point: ComparedPoint) -> bool:
    """Whether a repeat is done and none failed: later repeats may not have been started yet."""
    states = [run.state for run in point.repeats]
    return State.done in states and State.failed not in states


def join_names(names: Sequence[str]) -> str:
    """Names as a phrase: `a`, `a and b`, `a, b and c`, `a, b and 7 others`. At most `MAX_NAMES` are named."""
    shown = list(names[:MAX_NAMES])
    if len(names) > MAX_NAMES:
        rest = len(names) - (MAX_NAMES - 1)
        return f"{', '.join(shown[: MAX_NAMES - 1])} and {rest} others"
    if len(shown) < 2:
        return "".join(shown)
    return f"{', '.join(shown[:-1])} and {shown[-1]}"


def recommendation_candidates(
    points: Sequence[ComparedPoint], other_loss: Sequence[ComparedPoint], ranked: RankedJobs | None
) -> list[ComparedPoint]:
    """The points that may be recommended: done, not diverged, with the loss of their job, and of a job not shown to be worse.

    `other_loss`: points whose loss differs from that of their own job. `ranked`: None if the quality was not compared.
    """
    candidates = [
        point for point in points if point.measured.steps and point not in other_loss and is_recommendable(point)
    ]
    if ranked is None:
        return candidates
    not_significantly_worse: set[str] = set()
    for job in ranked.not_significantly_worse:
        not_significantly_worse |= {point.name for point in job.points}
    return [point for point in candidates if point.name in not_significantly_worse]


def recommend_best_quality(
    ranked: RankedJobs,
    candidates: Sequence[ComparedPoint],
    cheapest_names: Sequence[str],
    arguments_by_name: dict[str, str],
) -> list[Recommendation]:
    """The point to take for the best value of the metric; none if no point of the best job is among the candidates.

    If the job has several points, one of `cheapest_names` (recommended for speed or memory) is preferred.
    """
    candidate_names = {point.name for point in candidates}
    points = [point for point in ranked.best.points if point.name in candidate_names]
    if not points:
        return []
    best = min(points, key=lambda point: point.name not in cheapest_names)
    goal = f"the {ranked.metric.superlative} {ranked.metric.name}"
    return [Recommendation(goal, best, readable(ranked.value(ranked.best)), arguments_by_name[best.name])]


def recommend_cheapest(
    candidates: Sequence[ComparedPoint], arguments_by_name: dict[str, str]
) -> tuple[str, list[Recommendation]]:
    """(sentence on speed and memory, the fastest point and the one with the least memory), of points of equal quality.

    A point is taken only if it is shown to be better than another one. Below two candidates the result is ("", []).
    """
    if len(candidates) < 2:
        return "", []
    recommended = []
    clauses = []
    not_shown = []  # costs in which no two points are shown to differ
    fastest = _fastest(candidates)
    if fastest is not None and fastest.is_shown:
        is_repeated = all(point.summary.repeats > 1 for point in candidates)
        speed = f"{fastest.point.measured.tokens_per_s:,.0f} tokens/s"
        why = f"{speed}{'' if is_repeated else '; one run each'}{_equals_text(fastest)}"
        clauses.append(f"{fastest.point.name} is the fastest ({why})")
        recommended.append(
            Recommendation("the most tokens/s", fastest.point, why, arguments_by_name[fastest.point.name])
        )
    elif fastest is not None:
        not_shown.append("speed")
    smallest = _smallest(candidates)
    if smallest is not None and smallest.is_shown:
        why = f"{smallest.point.measured.memory_gib:.3g} GiB{_equals_text(smallest)}"
        clauses.append(f"{smallest.point.name} takes the least memory ({why})")
        recommended.append(
            Recommendation("the least memory", smallest.point, why, arguments_by_name[smallest.point.name])
        )
    elif smallest is not None:
        not_shown.append("memory")
    if not_shown:
        clauses.append(f"no difference in {' or '.join(not_shown)} shown")
    if not clauses:
        return "", []
    sentence = "; ".join(clauses)
    if clauses[0].startswith("no "):
        sentence = f"N{sentence[1:]}"
    return f"{sentence}.", recommended


def is_speed_shown(points: Sequence[ComparedPoint]) -> bool:
    """Whether any two of the points that can be recommended are shown to differ in speed."""
    fastest = _fastest([point for point in points if is_recommendable(point)])
    return fastest is not None and fastest.is_shown


def is_memory_shown(points: Sequence[ComparedPoint]) -> bool:
    """Whether any two of the points that can be recommended are shown to differ in memory."""
    smallest = _smallest([point for point in points if is_recommendable(point)])
    return smallest is not None and smallest.is_shown


def _equals_text(extreme: _Extreme) -> str:
    """The points that are not shown to differ from the best one, as a clause; empty if there are none."""
    names = [point.name for point in extreme.equals]
    return f"; no difference shown from {join_names(names)}" if names else ""


def _fastest(points: Sequence[ComparedPoint]) -> _Extreme | None:
    """The point with the most tokens/s; None if the speed of fewer than two points is known."""
    return _extreme(points, lambda point: point.measured.tokens_per_s, speed_range, largest=True)


def _smallest(points: Sequence[ComparedPoint]) -> _Extreme | None:
    """The point with the least memory; None if the memory of fewer than two points is known."""
    return _extreme(points, lambda point: point.measured.memory_gib, memory_range, largest=False)


def _extreme(
    points: Sequence[ComparedPoint],
    value_of: Callable[[ComparedPoint], float | None],
    range_of: Callable[[ComparedPoint, bool], tuple[float, float] | None],
    *,
    largest: bool,
) -> _Extreme | None:
    """The point with the best value, and which others overlap with its range; None if fewer than two have value and range.

    `range_of(point, is_repeated)` is the (low, high) within which the value may lie. `largest`: the largest value is the best.
    """
    is_repeated = all(point.summary.repeats > 1 for point in points)
    known: list[tuple[float, tuple[float, float], ComparedPoint]] = []  # (value, range, point)
    for point in points:
        value = value_of(point)
        value_range = range_of(point, is_repeated)
        if value is not None and value_range is not None:
            known.append((value, value_range, point))
    if len(known) < 2:
        return None
    choose = max if largest else min
    _, best_range, best = choose(known, key=lambda entry: entry[0])
    equals = [point for _, value_range, point in known if point is not best and ranges_overlap(best_range, value_range)]
    is_any_worse = len(equals) < len(known) - 1
    return _Extreme(best, equals, is_shown=is_any_worse)


def speed_range(point: ComparedPoint, is_repeated: bool) -> tuple[float, float] | None:
    """The range in tokens/s within which a point's speed may lie; None if too few steps were measured.

    If all points are repeated (`is_repeated`), it goes from the slowest to the fastest repeat. Otherwise it is the middle half
    of the steps of its single run.
    """
    if is_repeated and point.summary.spread is not None:
        return point.summary.spread
    measured = point.measured
    counted_steps = measured.steps - measured.warmup_steps
    if not measured.warmup_steps or counted_steps < FEW_SPEED_STEPS:
        return None
    return measured.tokens_per_s_quartiles


def memory_range(point: ComparedPoint, is_repeated: bool) -> tuple[float, float] | None:
    """The range in GiB within which a point's memory may lie; None if it was not measured.

    It covers the peaks of all repeats if all points are repeated (`is_repeated`), and is at least `MEMORY_TOLERANCE` wide.
    """
    peak = point.measured.memory_gib
    if peak is None:
        return None
    peaks = point.summary.memory_gib_repeats if is_repeated else ()
    is_cpu = point.first_repeat.record.device == "cpu"
    half_width = peak * (CPU_MEMORY_TOLERANCE if is_cpu else MEMORY_TOLERANCE) / 2
    return min([*peaks, peak - half_width]), max([*peaks, peak + half_width])


def ranges_overlap(first: tuple[float, float], second: tuple[float, float]) -> bool:
    """Whether two (low, high) ranges overlap."""
    return first[0] <= second[1] and second[0] <= first[1]


def merge_recommendations_by_point(choices: Sequence[Recommendation]) -> list[Recommendation]:
    """The choices with those for the same point joined into one, with a goal such as `the most tokens/s and the least memory`."""
    choice_by_point: dict[str, Recommendation] = {}
    for choice in choices:
        earlier = choice_by_point.get(choice.point.name)
        if earlier is None:
            choice_by_point[choice.point.name] = choice
        else:
            choice_by_point[choice.point.name] = Recommendation(
                goal=f"{earlier.goal} and {choice.goal}",
                point=choice.point,
                why=f"{earlier.why}; {choice.why}",
                arguments=choice.arguments,
            )
    return list(choice_by_point.values())

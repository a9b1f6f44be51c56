"""Which point of a comparison to take: for the best quality, the most speed and the least memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from launch.compare.compared_job import point_has_diverged
from launch.compare.interval import Interval
from launch.compare.quality import RankedJobs
from trainer.reporting.numbers import format_metric
from trainer.reporting.status import RunState

if TYPE_CHECKING:
    from launch.compare.compared_point import ComparedPoint

MEMORY_TOLERANCE = 0.05
"""Relative difference of memory up to which two points count as equal; beyond it, repeats say it themselves."""
CPU_MEMORY_TOLERANCE = 0.15
"""The same on a CPU, where the resident set of the process has its libraries in it."""
MIN_SPEED_STEPS = 5
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
class _BestPoint:
    """The point with the best value of a cost (speed or memory), and the points that are not shown to differ from it."""

    point: ComparedPoint
    not_shown_to_differ: list[ComparedPoint]
    is_any_shown_worse: bool
    """Whether at least one point is shown to be worse. If not, the cost is no reason to take the best point."""

    @property
    def not_shown_to_differ_text(self) -> str:
        """A clause that names the points that are not shown to differ, such as `; no difference shown from b`; empty without."""
        names = [point.name for point in self.not_shown_to_differ]
        return f"; no difference shown from {join_names(names)}" if names else ""


def is_recommendable(point: ComparedPoint) -> bool:
    """Whether a point is done and did not diverge. Only such points are recommended, or marked as the best."""
    return is_done(point) and not point_has_diverged(point)


def is_done(point: ComparedPoint) -> bool:
    """Whether at least one repeat of a point is done and none has failed: later repeats may not have been started yet."""
    states = [run.state for run in point.repeats]
    return RunState.done in states and RunState.failed not in states


def join_names(names: Sequence[str]) -> str:
    """List names in a sentence: `a`, `a and b`, `a, b and c`, `a, b, c and 7 others`. At most `MAX_NAMES` are named."""
    if len(names) > MAX_NAMES:
        num_named = MAX_NAMES - 1  # the others count as one more part of the phrase
        return f"{', '.join(names[:num_named])} and {len(names) - num_named} others"
    if len(names) < 2:
        return "".join(names)
    return f"{', '.join(names[:-1])} and {names[-1]}"


def recommendation_candidates(
    points: Sequence[ComparedPoint], points_with_other_loss: Sequence[ComparedPoint], ranked: RankedJobs | None
) -> list[ComparedPoint]:
    """The points that may be recommended: done, not diverged, with the loss that they should have, and not shown to be worse.

    `points_with_other_loss`: points whose loss differs from that of an earlier point although they differ in strategy
        alone.
    `ranked`: the jobs by quality; a job is all points that train the same. None if the quality was not compared.
    """
    candidates = [
        point
        for point in points
        if point.measured.steps and point not in points_with_other_loss and is_recommendable(point)
    ]
    if ranked is None:
        return candidates
    names_not_worse: set[str] = set()
    for job in ranked.not_significantly_worse:
        names_not_worse |= {point.name for point in job.points}
    return [point for point in candidates if point.name in names_not_worse]


def recommend_best_quality(
    ranked: RankedJobs,
    candidates: Sequence[ComparedPoint],
    cheapest_names: Sequence[str],
    arguments_by_name: dict[str, str],
) -> list[Recommendation]:
    """Recommend a point of the job with the best held-out metric.

    The list is empty if none of its points is among the candidates. A job is all points that train the same: they differ in
    strategy and seed alone. If the job has several points, one that is recommended for speed or memory (`cheapest_names`)
    is preferred.

    `arguments_by_name`: by name of a point, the settings to paste behind `shardtune train`.
    """
    candidate_names = {point.name for point in candidates}
    points = [point for point in ranked.best.points if point.name in candidate_names]
    if not points:
        return []
    best_point = next((point for point in points if point.name in cheapest_names), points[0])
    goal = f"the {ranked.metric.superlative} {ranked.metric.name}"
    value = format_metric(ranked.value(ranked.best))
    return [Recommendation(goal, best_point, why=value, arguments=arguments_by_name[best_point.name])]


def recommend_cheapest(
    candidates: Sequence[ComparedPoint], arguments_by_name: dict[str, str]
) -> tuple[str, list[Recommendation]]:
    """Recommend, among points of equal quality, the fastest and the one with the least memory.

    A point is recommended only if it is shown to be better than another one: if their ranges of speed (or memory) do not
    overlap.

    Returns (sentence on speed and memory, recommendations). With fewer than two candidates, or if neither speed nor memory
    is known, that is `("", [])`. `arguments_by_name`: by name of a point, the settings to paste behind `shardtune train`.
    """
    if len(candidates) < 2:
        return "", []
    recommendations = []
    clauses = []
    costs_without_difference = []
    fastest = _fastest_point(candidates)
    if fastest is not None and fastest.is_any_shown_worse:
        is_repeated = all(point.summary.repeats > 1 for point in candidates)
        # Said to the reader, because a range within a single run says less than one over repeats.
        one_run_each = "" if is_repeated else "; one run each"
        speed_text = f"{fastest.point.measured.tokens_per_s:,.0f} tokens/s{one_run_each}"
        recommendation = _recommend_best_point(fastest, "the most tokens/s", speed_text, arguments_by_name)
        clauses.append(f"{fastest.point.name} is the fastest ({recommendation.why})")
        recommendations.append(recommendation)
    elif fastest is not None:
        costs_without_difference.append("speed")
    smallest = _point_with_least_memory(candidates)
    if smallest is not None and smallest.is_any_shown_worse:
        memory_text = f"{smallest.point.measured.memory_gib:.3g} GiB"
        recommendation = _recommend_best_point(smallest, "the least memory", memory_text, arguments_by_name)
        clauses.append(f"{smallest.point.name} takes the least memory ({recommendation.why})")
        recommendations.append(recommendation)
    elif smallest is not None:
        costs_without_difference.append("memory")
    if costs_without_difference:
        # In upper case if the sentence begins with it.
        no = "no" if clauses else "No"
        clauses.append(f"{no} difference in {' or '.join(costs_without_difference)} shown")
    return (f"{'; '.join(clauses)}.", recommendations) if clauses else ("", [])


def _recommend_best_point(
    best: _BestPoint, goal: str, value_text: str, arguments_by_name: dict[str, str]
) -> Recommendation:
    """Recommend the best point for a goal, such as `the least memory`; the reason is its value, and which points may be as good.

    `arguments_by_name`: by name of a point, the settings to paste behind `shardtune train`.
    """
    return Recommendation(
        goal=goal,
        point=best.point,
        why=f"{value_text}{best.not_shown_to_differ_text}",
        arguments=arguments_by_name[best.point.name],
    )


def is_speed_difference_shown(points: Sequence[ComparedPoint]) -> bool:
    """Whether any two of the points that can be recommended are shown to differ in speed."""
    fastest = _fastest_point([point for point in points if is_recommendable(point)])
    return fastest is not None and fastest.is_any_shown_worse


def is_memory_difference_shown(points: Sequence[ComparedPoint]) -> bool:
    """Whether any two of the points that can be recommended are shown to differ in memory."""
    smallest = _point_with_least_memory([point for point in points if is_recommendable(point)])
    return smallest is not None and smallest.is_any_shown_worse


def _fastest_point(points: Sequence[ComparedPoint]) -> _BestPoint | None:
    """The point with the most tokens/s; None if the speed of fewer than two points is known."""
    return _best_point(points, lambda point: point.measured.tokens_per_s, speed_range, largest_is_best=True)


def _point_with_least_memory(points: Sequence[ComparedPoint]) -> _BestPoint | None:
    """The point with the least memory; None if the memory of fewer than two points is known."""
    return _best_point(points, lambda point: point.measured.memory_gib, memory_range, largest_is_best=False)


class _MeasuredValue(NamedTuple):
    """The speed or memory of one point: its value, and the range within which it may lie."""

    value: float
    value_range: Interval
    point: ComparedPoint


def _best_point(
    points: Sequence[ComparedPoint],
    value_of: Callable[[ComparedPoint], float | None],
    range_of: Callable[[ComparedPoint, bool], Interval | None],
    *,
    largest_is_best: bool,
) -> _BestPoint | None:
    """Find the point with the best speed or memory, and which points are not shown to differ from it: their ranges overlap.

    `value_of`: reads a point's value, None if it is not known. `range_of(point, is_repeated)`: the interval within which
    it may lie; `is_repeated` says whether all points have several repeats. None if fewer than two points have a value and a
    range.
    """
    is_repeated = all(point.summary.repeats > 1 for point in points)
    measured_values: list[_MeasuredValue] = []
    for point in points:
        value = value_of(point)
        value_range = range_of(point, is_repeated)
        if value is not None and value_range is not None:
            measured_values.append(_MeasuredValue(value, value_range, point))
    if len(measured_values) < 2:
        return None
    choose = max if largest_is_best else min
    best = choose(measured_values, key=lambda measured: measured.value)
    others = [measured for measured in measured_values if measured is not best]
    not_shown_to_differ = [measured.point for measured in others if best.value_range.overlaps(measured.value_range)]
    return _BestPoint(best.point, not_shown_to_differ, is_any_shown_worse=len(not_shown_to_differ) < len(others))


def speed_range(point: ComparedPoint, is_repeated: bool) -> Interval | None:
    """The range in tokens/s within which a point's speed may lie, by which two points are told apart.

    The first case that applies:

    - All points are repeated (`is_repeated`): from the slowest to the fastest repeat.
    - Fewer than `MIN_SPEED_STEPS` steps were measured behind the warm-up: None.
    - Otherwise: the middle half of the steps of its single run.
    """
    if is_repeated and point.summary.spread is not None:
        return point.summary.spread
    measured = point.measured
    num_counted_steps = measured.steps - measured.warmup_steps
    # Without a warm-up, all steps were in the first logging interval, which says nothing of the speed.
    if not measured.warmup_steps or num_counted_steps < MIN_SPEED_STEPS:
        return None
    return measured.tokens_per_s_quartiles


def memory_range(point: ComparedPoint, is_repeated: bool) -> Interval | None:
    """The range in GiB within which a point's memory may lie, by which two points are told apart; None if it was not measured.

    It covers the peaks of all repeats if all points are repeated (`is_repeated`), and is at least `MEMORY_TOLERANCE` of the
    peak wide. On a CPU that is `CPU_MEMORY_TOLERANCE`, because the memory of the process has its libraries in it.
    """
    peak = point.measured.memory_gib
    if peak is None:
        return None
    peaks = point.summary.memory_gib_repeats if is_repeated else ()
    is_cpu = point.first_repeat.record.device == "cpu"
    half_width = peak * (CPU_MEMORY_TOLERANCE if is_cpu else MEMORY_TOLERANCE) / 2
    return Interval(min([*peaks, peak - half_width]), max([*peaks, peak + half_width]))


def merge_recommendations_by_point(recommendations: Sequence[Recommendation]) -> list[Recommendation]:
    """Join the recommendations for the same point, so that each point is named once, for all its goals.

    Such as `the most tokens/s and the least memory`.
    """
    merged_by_point: dict[str, Recommendation] = {}
    for recommendation in recommendations:
        name = recommendation.point.name
        earlier = merged_by_point.get(name)
        if earlier is None:
            merged_by_point[name] = recommendation
        else:
            merged_by_point[name] = Recommendation(
                goal=f"{earlier.goal} and {recommendation.goal}",
                point=recommendation.point,
                why=f"{earlier.why}; {recommendation.why}",
                arguments=recommendation.arguments,
            )
    return list(merged_by_point.values())

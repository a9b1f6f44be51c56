"""The answer of a comparison: a few sentences, and which point to take when, with the arguments to paste.

Points that train the same job (they differ in strategy or ranks) must have the same loss. The answer is whether they do, and
which one is fast or small. Points of different jobs (methods, learning rates) are compared by their quality on held-out data. A
difference that chance explains is called "no difference shown".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from launch.compare.curves import rounded
from launch.compare.names import ABSENT, NOT_NAMED, SettingDifference, is_below, point_arguments, setting_argument
from launch.compare.quality import ComparedJob, RankedJobs, diverged, jobs_of, quality_metric, rank
from launch.compare.recommendation import (
    MAX_NAMES,
    Recommendation,
    is_done,
    is_recommendable,
    listed,
    one_recommendation_a_point,
    recommend_best_quality,
    recommend_cheapest,
    recommendation_candidates,
)
from trainer.reporting.numbers import readable, short
from trainer.reporting.status import State

if TYPE_CHECKING:
    from launch.compare.compared_point import ComparedPoint

Tone = Literal["good", "bad", "warning", "note"]
TO_LEARN_MORE = (
    "To find out: take more held-out documents, or run.seed=1,2,3 as a further axis, which shows how far one job differs from "
    "itself."
)


@dataclass(frozen=True, slots=True)
class Conclusion:
    """What a comparison answers."""

    sentences: tuple[str, ...]
    tone: Tone
    recommendations: tuple[Recommendation, ...] = ()
    to_learn_more: str = ""
    """What to run if no difference is shown; empty if one is."""
    ranked: RankedJobs | None = None
    """The jobs by quality; None if it was not compared."""
    unfinished: str = ""
    """Which points are not done or diverged: the first of the sentences; empty if there are none."""
    headline: str = ""
    """The sentence that answers first: about parity if it is broken, else about quality, else about parity."""

    @property
    def lines(self) -> list[str]:
        """The answer as lines of text."""
        lines = list(self.sentences)
        for choice in self.recommendations:
            arguments = f": {choice.arguments}" if choice.arguments else ""
            lines.append(f"For {choice.goal} take {choice.point.name} ({choice.why}){arguments}")
        if self.to_learn_more:
            lines.append(self.to_learn_more)
        return lines


def conclude(points: Sequence[ComparedPoint], differences: Sequence[SettingDifference]) -> Conclusion:
    """The answer to a comparison of two points or more: sentences, a tone, and which point to take for which goal.

    A comparison of a single point has nothing to conclude: its answer is empty. `differences`: the settings that differ.
    """
    jobs = jobs_of(points)
    if len(points) < 2:
        return Conclusion((), "note")
    if not jobs:
        return Conclusion(("No point has taken a step.",), "note", headline="No point has taken a step.")

    # Do points of the same job have the same loss?
    same_job = [point for point in points if point.is_same_job]
    other_loss = [point for point in same_job if point.loss_difference is not None and not point.loss_difference.same]
    sentences = {"unfinished": _unfinished_sentence(points), "parity": _parity_sentence(same_job, other_loss)}
    sentences["rates"] = _rates_sentence(points, differences)

    # Which job is best on held-out data?
    metric = quality_metric(jobs)
    ranked = rank(jobs, metric) if metric is not None else None
    if ranked is not None:
        sentences["quality"] = _quality_sentence(jobs, ranked, differences)
        sentences["evidence"] = _evidence_sentence(ranked)
    elif len(jobs) == 1:
        sentences["seeds"] = _seeds_sentence(jobs[0])
    else:
        sentences |= _sentences_without_quality(jobs)
    is_quality_shown = ranked is not None and bool(ranked.shown_worse)

    # Which point is the fastest, and which takes the least memory, of those that are not shown to be worse?
    arguments_by_name = {point.name: point_arguments(differences, number) for number, point in enumerate(points)}
    candidates = recommendation_candidates(points, other_loss, ranked)
    sentences["cost"], recommended = recommend_cheapest(candidates, arguments_by_name)
    if ranked is not None and is_quality_shown:
        cheapest_names = [choice.point.name for choice in recommended]
        recommended = [*recommend_best_quality(ranked, candidates, cheapest_names, arguments_by_name), *recommended]
        sentences["cost"] = _among_the_best(sentences["cost"])

    tone: Tone = "note"
    if other_loss:
        tone = "bad"
    elif is_quality_shown or any(point.loss_difference is not None for point in same_job):
        tone = "good"
    return Conclusion(
        sentences=tuple(sentence for sentence in sentences.values() if sentence),
        tone=tone,
        recommendations=tuple(one_recommendation_a_point(recommended)),
        to_learn_more=TO_LEARN_MORE if ranked is not None and not is_quality_shown else "",
        ranked=ranked,
        unfinished=sentences["unfinished"],
        headline=_headline(sentences, is_parity_broken=bool(other_loss)),
    )


def _headline(sentences: dict[str, str], *, is_parity_broken: bool) -> str:
    """The sentence that answers first: broken parity, else quality, else parity, seeds or cost, the first that there is.

    `sentences`: by kind, as `conclude` makes them; an empty one counts as none.
    """
    order: tuple[str, ...] = ("quality", "parity", "seeds", "no quality", "cost", "unfinished")
    if is_parity_broken:
        order = ("parity", *order)
    return next((sentences[kind] for kind in order if sentences.get(kind)), "Nothing to compare.")


def _rates_sentence(points: Sequence[ComparedPoint], differences: Sequence[SettingDifference]) -> str:
    """Which points trained at which learning rate, if the rate follows from other settings; empty if it does not differ."""
    rates = next((difference.values for difference in differences if difference.key == "optim.lr"), ())
    other_settings = [difference for difference in differences if difference.key != "optim.lr"]
    arguments = [point_arguments(other_settings, number) for number in range(len(points))]
    # If points with the same other settings have several rates, the rate is an axis of its own.
    is_axis = bool(rates) and len(set(arguments)) < len(set(zip(arguments, rates, strict=True)))
    if not rates or is_axis:
        return ""
    names_by_rate: dict[str, list[str]] = {}
    for point, rate in zip(points, rates, strict=True):
        names_by_rate.setdefault(short(rate), []).append(point.name)
    parts = [f"{rate} for {listed(names)}" for rate, names in names_by_rate.items()]
    return f"The points trained at different learning rates (optim.lr): {', '.join(parts)}."


def _seeds_sentence(job: ComparedJob) -> str:
    """How far the held-out metric of one job differs between its seeds; empty for one seed, and without such a metric."""
    metric = quality_metric([job])
    if job.seeds < 2 or metric is None:
        return ""
    values = job.values(metric.name)
    return f"One job with {job.seeds} seeds: {metric.name} is {readable(min(values))} to {readable(max(values))}."


def _among_the_best(sentence: str) -> str:
    """The sentence on speed and memory, with the remark that it is only about points that are not shown to be worse."""
    if not sentence:
        return ""
    without_capital = f"n{sentence[1:]}" if sentence.startswith("No ") else sentence
    return f"Of the points that are not shown to be worse: {without_capital}"


def _unfinished_sentence(points: Sequence[ComparedPoint]) -> str:
    """Which points are not done, and which diverged, so that nobody misses them in a long table; empty if all are fine."""
    names_by_problem: dict[str, list[str]] = {}
    for point in points:
        problem = None
        if not is_done(point):
            problem = "stopped" if point.state == State.preempted else point.state
        elif diverged(point):
            problem = "diverged"
        if problem is not None:
            names_by_problem.setdefault(problem, []).append(point.name)
    sentences = []
    for problem, names in names_by_problem.items():
        sentences.append(f"{len(names)} of {len(points)} points {problem}: {listed(names)}.")
    return " ".join(sentences)


def _parity_sentence(same_job: Sequence[ComparedPoint], other_loss: Sequence[ComparedPoint]) -> str:
    """Whether the points that train the same job as an earlier point have its loss.

    `same_job`: all such points; without any, the sentence is empty. `other_loss`: those of them that have another loss.
    """
    if not same_job:
        return ""
    if other_loss:
        return _broken_parity_sentence(same_job, other_loss)
    differences = [point.loss_difference.early for point in same_job if point.loss_difference is not None]
    if not differences:
        return "No step has a loss in two points of one job: nothing says whether their losses agree."
    largest = max(differences)
    within = "to the last digit" if largest == 0 else f"within {rounded(largest)}"
    baselines = list(dict.fromkeys(str(point.baseline_name) for point in same_job))
    names = [point.name for point in same_job]
    if len(baselines) == 1:
        verb = "has" if len(names) == 1 else "have"
        return f"{listed(names)} {verb} the same loss as {baselines[0]}, {within}."
    return f"Strategies do not change the loss: {len(names)} points agree with the first one of the same settings, {within}."


def _broken_parity_sentence(same_job: Sequence[ComparedPoint], other_loss: Sequence[ComparedPoint]) -> str:
    """Which points have another loss than the earlier point of the same job, how far, and from which step."""
    clauses = []
    for point in other_loss[:MAX_NAMES]:
        difference = point.loss_difference
        assert difference is not None
        clauses.append(
            f"{point.name} differs from {point.baseline_name} by {rounded(difference.early)} at step {difference.early_step}"
        )
    more = f", and {len(other_loss) - MAX_NAMES} more" if len(other_loss) > MAX_NAMES else ""
    verb = "has" if len(other_loss) == 1 else "have"
    return (
        f"{len(other_loss)} of {len(same_job)} points that should only compute elsewhere {verb} another loss: "
        f"{'; '.join(clauses)}{more}. Find out why before you use them."
    )


def _sentences_without_quality(jobs: Sequence[ComparedJob]) -> dict[str, str]:
    """{kind: sentence} on several jobs whose quality is not compared: why not, and the seeds of the only job that is done."""
    done_jobs = [job for job in jobs if job.done_runs]
    if len(done_jobs) < 2:
        seeds = _seeds_sentence(done_jobs[0]) if done_jobs else ""
        return {"seeds": seeds, "no quality": "Fewer than two jobs are done: their quality cannot be compared yet."}
    why = (
        "No held-out metric was asked of all jobs alike, so their quality is not compared: give data.eval_path, or the "
        "same evaluation.tasks to all points."
    )
    return {"no quality": why}


def _evidence_sentence(ranked: RankedJobs) -> str:
    """What the shown differences rest on, such as seeds; empty if none is shown, because the sentence on quality says it then."""
    if not ranked.shown_worse:
        return ""
    one_seed = all(job.seeds == 1 for job in ranked.jobs)
    caveat = ", with one seed each: another seed may change it" if one_seed else ""
    return f"The order by {ranked.metric.name} rests on {listed(ranked.sources)}{caveat}."


def _quality_sentence(jobs: Sequence[ComparedJob], ranked: RankedJobs, differences: Sequence[SettingDifference]) -> str:
    """Which job is best on held-out data, and which ones are not shown to be worse.

    `jobs`: all jobs, which decide how a job is named. `ranked`: those that could be compared.
    """
    metric = ranked.metric
    best_name = job_name(ranked.best, jobs, differences)
    best_value = readable(ranked.value(ranked.best))
    if not ranked.shown_worse:
        values = [ranked.value(job) for job in ranked.jobs]
        reason = "nothing says how far another seed, or other documents, would change it"
        if ranked.sources:
            reason = f"chance explains that much, judged by {listed(ranked.sources)}"
        return (
            f"No difference in {metric.name} shown between {len(values)} jobs: {readable(min(values))} to "
            f"{readable(max(values))} ({reason}). The {metric.word} is that of {best_name}."
        )
    sentence = f"{best_name} has the {metric.word} {metric.name}: {best_value}{_cost_text(ranked.best)}"
    not_worse_names = [
        job_name(job, jobs, differences) for job in ranked.not_shown_worse[1:]
    ]  # without the best itself
    worse = len(ranked.shown_worse)
    if not_worse_names:
        others = "the other is" if worse == 1 else f"the {worse} others are"
        return f"{sentence}. No difference shown from {listed(not_worse_names)}; {others} worse."
    others = "The other is" if worse == 1 else f"The {worse} others are"
    return f"{sentence}. {others} worse."


def job_name(job: ComparedJob, jobs: Sequence[ComparedJob], differences: Sequence[SettingDifference]) -> str:
    """What a job is called: the name of its only point, or the settings in which it differs from the other jobs."""
    if len(job.points) == 1:
        return job.points[0].name
    arguments = []
    for difference in differences:
        key = difference.key
        values = {short(other.settings.get(key, ABSENT)) for other in jobs}
        if len(values) > 1 and key in job.settings and not is_below(key, NOT_NAMED):
            arguments.append(setting_argument(key, job.settings[key]))
    return " ".join(arguments) or job.points[0].name


def _cost_text(job: ComparedJob) -> str:
    """Memory and speed of a job, such as `, at 3.1 to 4 GiB and 900 tokens/s`; empty if neither is known.

    A range goes from the smallest to the largest value of its points.
    """
    clauses = []
    points = [point for point in job.points if is_recommendable(point)]
    memory = [point.measured.memory_gib for point in points if point.measured.memory_gib]
    if memory:
        clauses.append(f"{_range_text(memory, '.3g')} GiB")
    speeds = [point.measured.tokens_per_s for point in points if point.measured.tokens_per_s]
    if speeds:
        clauses.append(f"{_range_text(speeds, ',.0f')} tokens/s")
    return f", at {' and '.join(clauses)}" if clauses else ""


def _range_text(values: Sequence[float], number_format: str) -> str:
    low = format(min(values), number_format)
    high = format(max(values), number_format)
    return low if low == high else f"{low} to {high}"

"""The answer of a comparison: a few sentences, and which point to take when, with the arguments to paste.

Points that train the same job (they differ in strategy or ranks) must have the same loss. The answer is whether they do, and
which one is fast or small. Points of different jobs (methods, learning rates) are compared by their quality on held-out data. A
difference that chance explains is called "no difference shown".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from launch.compare.compared_job import ComparedJob, group_points_into_jobs, point_has_diverged
from launch.compare.curves import format_difference
from launch.compare.exported_step import earlier_export_text
from launch.compare.names import (
    ABSENT_VALUE,
    KEYS_LEFT_OUT_OF_NAMES,
    SettingDifference,
    is_below,
    point_arguments,
    setting_as_argument,
)
from launch.compare.quality import RankedJobs, quality_metric, rank_jobs_by_quality
from launch.compare.recommendation import (
    MAX_NAMES,
    Recommendation,
    is_done,
    is_recommendable,
    join_names,
    merge_recommendations_by_point,
    recommend_best_quality,
    recommend_cheapest,
    recommendation_candidates,
)
from trainer.reporting.numbers import format_metric, format_setting
from trainer.reporting.status import RunState

if TYPE_CHECKING:
    from launch.compare.compared_point import ComparedPoint

Tone = Literal["good", "bad", "warning", "note"]
TO_LEARN_MORE = (
    "To find out: take more held-out documents, or run.seed=1,2,3 as a further axis, which shows how far one job differs from "
    "itself."
)


@dataclass(frozen=True, slots=True)
class Conclusion:
    """The answer of a comparison: sentences, and which point to take for which goal."""

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
        """The answer as lines of text: its sentences, which point to take for which goal, and what to run to learn more."""
        lines = list(self.sentences)
        for choice in self.recommendations:
            arguments = f": {choice.arguments}" if choice.arguments else ""
            lines.append(f"For {choice.goal} take {choice.point.name} ({choice.why}){arguments}")
        if self.to_learn_more:
            lines.append(self.to_learn_more)
        return lines


def conclude_comparison(points: Sequence[ComparedPoint], differences: Sequence[SettingDifference]) -> Conclusion:
    """Conclude what a comparison answers: are losses equal where they must be, which job is best, which point fast or small?

    A point is one combination of settings; a job is all points that train the same: they differ in strategy and seed alone.
    A comparison of a single point has nothing to conclude: its answer is empty. `differences`: the settings in which the
    points differ.
    """
    # Only of points that took a step.
    jobs = group_points_into_jobs(points)
    if len(points) < 2:
        return Conclusion((), "note")
    if not jobs:
        return Conclusion(("No point has taken a step.",), "note", headline="No point has taken a step.")

    # Do points of the same job have the same loss?
    same_job_points = [point for point in points if point.should_have_loss_of_baseline]
    points_with_other_loss = [
        point
        for point in same_job_points
        if point.loss_difference is not None and not point.loss_difference.is_same_loss
    ]
    sentences = {
        "unfinished": _unfinished_and_diverged_sentences(points),
        "parity": _parity_sentence(same_job_points, points_with_other_loss),
        "rates": _learning_rates_sentence(points, differences),
    }

    # Which job is best on held-out data?
    metric = quality_metric(jobs)
    ranked = rank_jobs_by_quality(jobs, metric) if metric is not None else None
    if ranked is not None:
        sentences["quality"] = _quality_sentence(jobs, ranked, differences)
        sentences["evidence"] = _evidence_sentence(ranked)
    elif len(jobs) == 1:
        sentences["seeds"] = _seeds_sentence(jobs[0])
    else:
        sentences |= _sentences_without_quality(jobs)
    sentences["exported"] = _earlier_exports_sentence(points)
    is_quality_difference_shown = ranked is not None and bool(ranked.significantly_worse)

    # Which point is the fastest, and which takes the least memory, of those that are not shown to be worse?
    # What to paste behind `shardtune train` to get a point, such as `strategy=ddp`.
    arguments_by_name = {point.name: point_arguments(differences, index) for index, point in enumerate(points)}
    candidates = recommendation_candidates(points, points_with_other_loss, ranked)
    sentences["cost"], recommendations = recommend_cheapest(candidates, arguments_by_name)
    if ranked is not None and is_quality_difference_shown:
        cheapest_names = [recommendation.point.name for recommendation in recommendations]
        best_quality = recommend_best_quality(ranked, candidates, cheapest_names, arguments_by_name)
        recommendations = [*best_quality, *recommendations]
        sentences["cost"] = _with_remark_on_best_quality(sentences["cost"])

    tone: Tone = "note"
    if points_with_other_loss:
        tone = "bad"
    elif is_quality_difference_shown or any(point.loss_difference is not None for point in same_job_points):
        tone = "good"
    return Conclusion(
        sentences=tuple(sentence for sentence in sentences.values() if sentence),
        tone=tone,
        recommendations=tuple(merge_recommendations_by_point(recommendations)),
        to_learn_more=TO_LEARN_MORE if ranked is not None and not is_quality_difference_shown else "",
        ranked=ranked,
        unfinished=sentences["unfinished"],
        headline=_headline(sentences, is_parity_broken=bool(points_with_other_loss)),
    )


def _earlier_exports_sentence(points: Sequence[ComparedPoint]) -> str:
    """Say which points export an earlier step than the last one, whose metrics are compared, and its value; empty if none does.

    The first repeat of a point stands for all.
    """
    exports = []
    for point in points:
        export_text = earlier_export_text(point.first_repeat)
        if export_text:
            exports.append(f"{point.name} exports {export_text}")
    if not exports:
        return ""
    return f"The held-out metrics are those of the last step, which is not what these export: {'; '.join(exports)}."


def _headline(sentences: dict[str, str], *, is_parity_broken: bool) -> str:
    """Choose the sentence that answers the comparison's question, to stand first: that of the first kind that there is.

    The order of the kinds: `parity` if parity is broken, `quality`, `parity`, `seeds`, `no quality`, `cost`, `unfinished`.

    `sentences`: by kind; an empty sentence counts as none.
    """
    order: tuple[str, ...] = ("quality", "parity", "seeds", "no quality", "cost", "unfinished")
    if is_parity_broken:
        order = ("parity", *order)
    return next((sentences[kind] for kind in order if sentences.get(kind)), "Nothing to compare.")


def _learning_rates_sentence(points: Sequence[ComparedPoint], differences: Sequence[SettingDifference]) -> str:
    """Point out that points trained at different learning rates although nobody compares rates: each method has a usual one.

    `The points trained at different learning rates (optim.lr): 2e-5 for full, 2e-4 for lora and dora.` Empty if all points
    have the same rate, or if the rate is an axis of its own: points whose other settings are equal have several rates.

    `differences`: the settings in which the points differ.
    """
    rates = next((difference.values for difference in differences if difference.key == "optim.lr"), ())
    if not rates:
        return ""
    other_differences = [difference for difference in differences if difference.key != "optim.lr"]
    other_arguments = [point_arguments(other_differences, index) for index in range(len(points))]
    # If the rate followed from the other settings, it would add no further combinations.
    num_combinations = len(set(zip(other_arguments, rates, strict=True)))
    is_axis = num_combinations > len(set(other_arguments))
    if is_axis:
        return ""
    names_by_rate: dict[str, list[str]] = {}
    for point, rate in zip(points, rates, strict=True):
        names_by_rate.setdefault(format_setting(rate), []).append(point.name)
    clauses = [f"{rate} for {join_names(names)}" for rate, names in names_by_rate.items()]
    return f"The points trained at different learning rates (optim.lr): {', '.join(clauses)}."


def _seeds_sentence(job: ComparedJob) -> str:
    """Say how far the held-out metric of a job differs between its seeds: `One job with 3 seeds: eval/loss is 2.3100 to 2.3500.`

    A job is all points that train the same: they differ in strategy and seed alone. Empty for a single seed, or without a
    held-out metric.
    """
    metric = quality_metric([job])
    if job.num_seeds < 2 or metric is None:
        return ""
    values = job.value_of_each_seed(metric.name)
    return f"One job with {job.num_seeds} seeds: {metric.name} is {format_metric(min(values))} to {format_metric(max(values))}."


def _with_remark_on_best_quality(cost_sentence: str) -> str:
    """Put before the sentence on speed and memory that it is only about points that are not shown to be worse.

    An empty sentence stays empty.
    """
    if not cost_sentence:
        return ""
    # It stands behind a colon now: `No difference ...` goes on in lower case, and a point's name stays as it is.
    continued = f"n{cost_sentence[1:]}" if cost_sentence.startswith("No ") else cost_sentence
    return f"Of the points that are not shown to be worse: {continued}"


def _unfinished_and_diverged_sentences(points: Sequence[ComparedPoint]) -> str:
    """Say which points are not done, and which diverged, so that nobody misses them in a long table.

    For example `2 of 8 points failed: a and b. 1 of 8 points diverged: c.` Empty if all points are done and none diverged.
    A point is one combination of settings, with its runs.
    """
    names_by_problem: dict[
        str, list[str]
    ] = {}  # the problem is a word for the sentence: `failed`, `stopped`, `diverged` ...
    for point in points:
        problem: str | None = None
        if not is_done(point):
            problem = "stopped" if point.state == RunState.preempted else point.state
        elif point_has_diverged(point):
            problem = "diverged"
        if problem is not None:
            names_by_problem.setdefault(problem, []).append(point.name)
    sentences = []
    for problem, names in names_by_problem.items():
        sentences.append(f"{len(names)} of {len(points)} points {problem}: {join_names(names)}.")
    return " ".join(sentences)


def _parity_sentence(same_job_points: Sequence[ComparedPoint], points_with_other_loss: Sequence[ComparedPoint]) -> str:
    """Say whether strategies compute the same: `fsdp2 and zero2 have the same loss as ddp, within 3e-7.`

    `same_job_points`: the points that differ from an earlier one, their baseline, in strategy alone, so that their losses
    must agree; without any, the sentence is empty. `points_with_other_loss`: those of them whose loss differs over the
    first steps.
    """
    if not same_job_points:
        return ""
    if points_with_other_loss:
        return _broken_parity_sentence(points_with_other_loss, num_same_job_points=len(same_job_points))
    differences = [
        point.loss_difference.first_steps_difference for point in same_job_points if point.loss_difference is not None
    ]
    if not differences:
        return "No step has a loss in two points of one job: nothing says whether their losses agree."
    within = "to the last digit" if max(differences) == 0 else f"within {format_difference(max(differences))}"
    baseline_names = list(dict.fromkeys(str(point.baseline_name) for point in same_job_points))
    names = [point.name for point in same_job_points]
    if len(baseline_names) == 1:
        verb = "has" if len(names) == 1 else "have"
        return f"{join_names(names)} {verb} the same loss as {baseline_names[0]}, {within}."
    return f"Strategies do not change the loss: {len(names)} points agree with the first one of the same settings, {within}."


def _broken_parity_sentence(points_with_other_loss: Sequence[ComparedPoint], num_same_job_points: int) -> str:
    """Warn that points do not have the loss of an earlier point although they must: how far it differs, and at which step.

    The difference is the largest relative one over the first steps, which rounding does not explain. At most `MAX_NAMES`
    points are named. `num_same_job_points`: how many points should have had the loss of an earlier one.
    """
    clauses = []
    for point in points_with_other_loss[:MAX_NAMES]:
        difference = point.loss_difference
        assert difference is not None  # else it would not be known to differ
        amount = f"by {format_difference(difference.first_steps_difference)} at step {difference.step_of_first_steps_difference}"
        clauses.append(f"{point.name} differs from {point.baseline_name} {amount}")
    num_with_other_loss = len(points_with_other_loss)
    more = f", and {num_with_other_loss - MAX_NAMES} more" if num_with_other_loss > MAX_NAMES else ""
    verb = "has" if num_with_other_loss == 1 else "have"
    return (
        f"{num_with_other_loss} of {num_same_job_points} points that should only compute elsewhere {verb} another loss: "
        f"{'; '.join(clauses)}{more}. Find out why before you use them."
    )


def _sentences_without_quality(jobs: Sequence[ComparedJob]) -> dict[str, str]:
    """Say why the quality of several jobs cannot be compared, as {kind: sentence}. A job is all points that train the same.

    - Fewer than two jobs are done: that, under `no quality`, and how the seeds of the only done job differ, under `seeds`.
    - Otherwise, under `no quality`: that the jobs have no held-out metric in common.
    """
    done_jobs = [job for job in jobs if job.done_runs]
    if len(done_jobs) < 2:
        seeds_sentence = _seeds_sentence(done_jobs[0]) if done_jobs else ""
        too_few = "Fewer than two jobs are done: their quality cannot be compared yet."
        return {"seeds": seeds_sentence, "no quality": too_few}
    no_common_metric = (
        "No held-out metric was asked of all jobs alike, so their quality is not compared: give data.eval_path, or the "
        "same evaluation.tasks to all points."
    )
    return {"no quality": no_common_metric}


def _evidence_sentence(ranked: RankedJobs) -> str:
    """Say what the ranking of the jobs is based on, so that readers know how far to trust it.

    For example `The order by eval/loss rests on seeds, with one seed each: another seed may change it.` A job is all points
    that train the same: they differ in strategy and seed alone. Empty if no job is significantly worse than the best one,
    because the sentence on quality names the evidence then.
    """
    if not ranked.significantly_worse:
        return ""
    # With one seed each, nothing says how far another seed would change the order.
    has_one_seed_each = all(job.num_seeds == 1 for job in ranked.jobs)
    caveat = ", with one seed each: another seed may change it" if has_one_seed_each else ""
    # The sources are nouns: "seeds", "held-out documents", or "intervals of shardtune evaluate".
    return f"The order by {ranked.metric.name} rests on {join_names(ranked.evidence_sources)}{caveat}."


def _quality_sentence(jobs: Sequence[ComparedJob], ranked: RankedJobs, differences: Sequence[SettingDifference]) -> str:
    """Say which job is best on held-out data, which jobs are not shown to be worse, and how many are.

    A job is all points that train the same: they differ in strategy and seed alone. If no job is significantly worse, the
    sentence says so, with the range of the values and the reason.

    `jobs`: all jobs, among which a job gets its name. `ranked`: those that could be compared, the best first.
    `differences`: the settings in which the points differ.
    """
    metric = ranked.metric
    best_name = job_name(ranked.best, jobs, differences)
    if not ranked.significantly_worse:
        values = [ranked.value(job) for job in ranked.jobs]
        reason = "nothing says how far another seed, or other documents, would change it"
        if ranked.evidence_sources:
            reason = f"chance explains that much, judged by {join_names(ranked.evidence_sources)}"
        return (
            f"No difference in {metric.name} shown between {len(values)} jobs: {format_metric(min(values))} to "
            f"{format_metric(max(values))} ({reason}). The {metric.superlative} is that of {best_name}."
        )
    best_value = format_metric(ranked.value(ranked.best))
    sentence = f"{best_name} has the {metric.superlative} {metric.name}: {best_value}{_cost_text(ranked.best)}"
    _, *not_worse_jobs = ranked.not_significantly_worse  # the first is the best job itself
    not_worse_names = [job_name(job, jobs, differences) for job in not_worse_jobs]
    num_worse = len(ranked.significantly_worse)
    others = "other is" if num_worse == 1 else f"{num_worse} others are"
    if not_worse_names:
        return f"{sentence}. No difference shown from {join_names(not_worse_names)}; the {others} worse."
    return f"{sentence}. The {others} worse."


def job_name(job: ComparedJob, jobs: Sequence[ComparedJob], differences: Sequence[SettingDifference]) -> str:
    """Name a job for a sentence: its only point (`fsdp2-lora`), or the settings in which it differs (`tuning=lora`).

    A job is all points that train the same: they differ in strategy and seed alone. `differences`: the settings in which
    the points of the comparison differ.
    """
    if len(job.points) == 1:
        return job.points[0].name
    arguments = []
    for difference in differences:
        key = difference.key
        values_of_jobs = {format_setting(any_job.settings.get(key, ABSENT_VALUE)) for any_job in jobs}
        if len(values_of_jobs) > 1 and key in job.settings and not is_below(key, KEYS_LEFT_OUT_OF_NAMES):
            arguments.append(setting_as_argument(key, job.settings[key]))
    return " ".join(arguments) or job.points[0].name


def _cost_text(job: ComparedJob) -> str:
    """Memory and speed of a job, to be added to a sentence: `, at 3.1 to 4 GiB and 900 tokens/s`; empty if neither is known.

    A range goes from the smallest to the largest value of the job's points that are done and did not diverge.
    """
    clauses = []
    points = [point for point in job.points if is_recommendable(point)]
    memory_gib = [point.measured.memory_gib for point in points if point.measured.memory_gib]
    if memory_gib:
        clauses.append(f"{_range_text(memory_gib, '.3g')} GiB")
    tokens_per_s = [point.measured.tokens_per_s for point in points if point.measured.tokens_per_s]
    if tokens_per_s:
        clauses.append(f"{_range_text(tokens_per_s, ',.0f')} tokens/s")
    return f", at {' and '.join(clauses)}" if clauses else ""


def _range_text(values: Sequence[float], number_format: str) -> str:
    """`3.1 to 4`, from the smallest to the largest value; one number if both look the same."""
    low = format(min(values), number_format)
    high = format(max(values), number_format)
    return low if low == high else f"{low} to {high}"

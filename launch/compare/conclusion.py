"""The answer of a comparison: a few sentences, and which point to take when, with the words to paste.

Points that train the same job (strategies, ranks) must have the same loss; the answer is whether they do, and which one is fast
or small. Points of different jobs (methods, learning rates) are compared by their quality on held-out data. A difference that
chance explains is called "no difference shown".
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from launch.compare.curves import rounded
from launch.compare.names import ABSENT, NOT_NAMED, SettingDifference, is_below
from launch.compare.quality import ComparedJob, RankedJobs, diverged, jobs_of, rank, watched_metric
from trainer.reporting.numbers import readable, short
from trainer.reporting.status import State

if TYPE_CHECKING:
    from launch.compare.compared_run import ComparedRun

Tone = Literal["good", "bad", "warning", "note"]
CHOICES = ("strategy", "tuning", "objective", "optim", "schedule", "launcher")
"""Groups of settings whose `name` is chosen by the group alone, as in `strategy=ddp`."""
MEMORY_TOLERANCE = 0.05
"""Relative difference of memory up to which two points count as equal; beyond it, repeats say it themselves."""
CPU_MEMORY_TOLERANCE = 0.15
"""The same on a CPU, where the resident set of the process has its libraries in it."""
FEW_SPEED_STEPS = 5
"""Steps behind the first logging interval below which a median speed decides nothing."""
TO_LEARN_MORE = (
    "To find out: take more held-out documents, or run.seed=1,2,3 as a further axis, which shows how far one job differs from "
    "itself."
)
MAX_NAMES = 4
"""Names that a sentence lists; of more it tells how many there are."""


@dataclass(frozen=True, slots=True)
class TakeWhen:
    """A point to take for a reason."""

    goal: str
    """What a reader wants, such as `least memory`."""
    point: ComparedRun
    why: str
    """Its number, and what is not shown to differ from it."""
    words: str
    """The settings to paste behind `shardtune train`; empty if the points differ in none."""


@dataclass(frozen=True, slots=True)
class Conclusion:
    """What a comparison answers."""

    sentences: tuple[str, ...]
    tone: Tone
    take: tuple[TakeWhen, ...] = ()
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
        for choice in self.take:
            words = f": {choice.words}" if choice.words else ""
            lines.append(f"For {choice.goal} take {choice.point.name} ({choice.why}){words}")
        if self.to_learn_more:
            lines.append(self.to_learn_more)
        return lines


@dataclass(frozen=True, slots=True)
class _Extreme:
    """The point with the best value of a cost, and those that are not shown to differ from it."""

    point: ComparedRun
    equals: list[ComparedRun]
    is_shown: bool
    """Whether any point is shown to be worse."""


def conclude(points: Sequence[ComparedRun], differences: Sequence[SettingDifference]) -> Conclusion:
    """The answer to a comparison of two points or more; of one run there is nothing to conclude."""
    jobs = jobs_of(points)
    if len(points) < 2:
        return Conclusion((), "note")
    if not jobs:
        return Conclusion(("No point has taken a step.",), "note", headline="No point has taken a step.")

    parity = [point for point in points if point.is_same_job]
    unequal = [point for point in parity if point.loss_difference is not None and not point.loss_difference.same]
    sentences = {"unfinished": _unfinished_sentence(points), "parity": _parity_sentence(parity, unequal)}
    sentences["rates"] = _rates_sentence(points, differences)
    metric = watched_metric(jobs)
    ranked = rank(jobs, metric) if metric is not None else None
    if ranked is not None:
        sentences["quality"] = _quality_sentence(jobs, ranked, differences)
        sentences["evidence"] = _evidence_sentence(ranked)
    elif len(jobs) == 1:
        sentences["seeds"] = _seeds_sentence(jobs[0])
    else:
        sentences |= _without_quality(jobs)

    words_by_name = {}
    for number, point in enumerate(points):
        words_by_name[point.name] = point_words(differences, number)
    pool = [point for point in points if point.measured.steps and point not in unequal and is_sound(point)]
    if ranked is not None:
        good_enough: set[str] = set()
        for job in ranked.not_shown_worse:
            good_enough |= {point.name for point in job.points}
        pool = [point for point in pool if point.name in good_enough]
    sentences["cost"], take = _cheapest(pool, words_by_name)
    is_quality_shown = ranked is not None and bool(ranked.shown_worse)
    if ranked is not None and is_quality_shown:
        take = [*_best_quality(ranked, pool, [choice.point.name for choice in take], words_by_name), *take]
        sentences["cost"] = _among_the_best(sentences["cost"])

    tone: Tone = "note"
    if unequal:
        tone = "bad"
    elif is_quality_shown or any(point.loss_difference is not None for point in parity):
        tone = "good"
    return Conclusion(
        sentences=tuple(sentence for sentence in sentences.values() if sentence),
        tone=tone,
        take=tuple(_merged(take)),
        to_learn_more=TO_LEARN_MORE if ranked is not None and not is_quality_shown else "",
        ranked=ranked,
        unfinished=sentences["unfinished"],
        headline=_headline(sentences, unequal=bool(unequal)),
    )


def _headline(sentences: dict[str, str], *, unequal: bool) -> str:
    """The sentence that answers first: broken parity, else quality, else parity, seeds or cost, the first that there is."""
    order: tuple[str, ...] = ("quality", "parity", "seeds", "no quality", "cost", "unfinished")
    if unequal:
        order = ("parity", *order)
    return next((sentences[kind] for kind in order if sentences.get(kind)), "Nothing to compare.")


def _rates_sentence(points: Sequence[ComparedRun], differences: Sequence[SettingDifference]) -> str:
    """Which points trained at which learning rate, if the rate follows from other settings; empty if it does not differ."""
    rates = next((difference.values for difference in differences if difference.key == "optim.lr"), ())
    other_settings = [difference for difference in differences if difference.key != "optim.lr"]
    words = [point_words(other_settings, number) for number in range(len(points))]
    # An axis of its own splits points that have the same other settings.
    if not rates or len(set(words)) < len(set(zip(words, rates, strict=True))):
        return ""
    names_by_rate: dict[str, list[str]] = {}
    for point, rate in zip(points, rates, strict=True):
        names_by_rate.setdefault(short(rate), []).append(point.name)
    parts = [f"{rate} for {listed(names)}" for rate, names in names_by_rate.items()]
    return f"The points trained at different learning rates (optim.lr): {', '.join(parts)}."


def _seeds_sentence(job: ComparedJob) -> str:
    """How far the watched metric of one job differs between its seeds; empty for one seed, and without held-out data."""
    metric = watched_metric([job])
    if job.seeds < 2 or metric is None:
        return ""
    values = job.values(metric.name)
    return f"One job with {job.seeds} seeds: {metric.name} is {readable(min(values))} to {readable(max(values))}."


def _among_the_best(sentence: str) -> str:
    """The sentence on speed and memory of points of which others were left out for their quality."""
    if not sentence:
        return ""
    without_capital = f"n{sentence[1:]}" if sentence.startswith("No ") else sentence
    return f"Of the points that are not shown to be worse: {without_capital}"


def is_sound(point: ComparedRun) -> bool:
    """Whether a point ended as it should and did not diverge, so that it can be recommended."""
    return _is_done(point) and not diverged(point)


def _is_done(point: ComparedRun) -> bool:
    """Whether a repeat is done and none failed: later repeats may not have been started yet."""
    states = [run.state for run in point.repeated.repeats]
    return State.done in states and State.failed not in states


def point_words(differences: Sequence[SettingDifference], number: int) -> str:
    """The settings of point `number` in which the points differ, as words of a shell: `strategy=ddp optim.lr=1e-3`."""
    words = []
    for difference in differences:
        value = difference.values[number]
        is_setting = not difference.key.startswith("run.json ") and not is_below(difference.key, NOT_NAMED)
        if is_setting and value != ABSENT:
            words.append(shlex.quote(setting_word(difference.key, value)))
    return " ".join(words)


def setting_word(key: str, value: Any) -> str:
    """A setting as it is typed: `tuning=lora`, `optim.lr=1e-3`, `tuning.dora=true`."""
    group, _, name = key.rpartition(".")
    if name == "name" and group in CHOICES:
        key = group
    return f"{key}={_typed_value(value)}"


def _typed_value(value: Any) -> str:
    """A value as it is typed behind `key=`."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        entries = [_typed_value(entry) for entry in value]
        return f"[{','.join(entries)}]"
    text = short(value)
    # A comma would make an axis of it, and a bracket a list.
    return f"'{text}'" if any(char in ",[]{}=:" for char in text) and "'" not in text else text


def listed(names: Sequence[str]) -> str:
    """Names as words: `a`, `a and b`, `a, b and c`, `a, b and 7 others`."""
    shown = list(names[:MAX_NAMES])
    if len(names) > MAX_NAMES:
        rest = len(names) - (MAX_NAMES - 1)
        return f"{', '.join(shown[: MAX_NAMES - 1])} and {rest} others"
    if len(shown) < 2:
        return "".join(shown)
    return f"{', '.join(shown[:-1])} and {shown[-1]}"


def _unfinished_sentence(points: Sequence[ComparedRun]) -> str:
    """Which points are not done, and which diverged, so that nobody misses them in a long table; empty if all are fine."""
    names_by_word: dict[str, list[str]] = {}
    words = {State.preempted: "stopped"}
    for point in points:
        if not _is_done(point):
            state = point.repeated.state
            names_by_word.setdefault(words.get(state, state), []).append(point.name)  # type: ignore[call-overload]
        elif diverged(point):
            names_by_word.setdefault("diverged", []).append(point.name)
    sentences = []
    for word, names in names_by_word.items():
        sentences.append(f"{len(names)} of {len(points)} points {word}: {listed(names)}.")
    return " ".join(sentences)


def _parity_sentence(parity: Sequence[ComparedRun], unequal: Sequence[ComparedRun]) -> str:
    """Whether the points that train the same job as another one have its loss; empty without such points.

    `unequal`: those that have another loss.
    """
    if not parity:
        return ""
    if unequal:
        clauses = []
        for point in unequal[:MAX_NAMES]:
            assert point.loss_difference is not None
            clauses.append(
                f"{point.name} differs from {point.against} by {rounded(point.loss_difference.early)} at step "
                f"{point.loss_difference.early_step}"
            )
        more = f", and {len(unequal) - MAX_NAMES} more" if len(unequal) > MAX_NAMES else ""
        verb = "has" if len(unequal) == 1 else "have"
        return (
            f"{len(unequal)} of {len(parity)} points that should only compute elsewhere {verb} another loss: "
            f"{'; '.join(clauses)}{more}. Find out why before you use them."
        )
    known = [point.loss_difference.early for point in parity if point.loss_difference is not None]
    if not known:
        return "No step has a loss in two points of one job: nothing says whether their losses agree."
    largest = max(known)
    within = "to the last digit" if largest == 0 else f"within {rounded(largest)}"
    baselines = list(dict.fromkeys(str(point.against) for point in parity))
    names = [point.name for point in parity]
    if len(baselines) == 1:
        verb = "has" if len(names) == 1 else "have"
        return f"{listed(names)} {verb} the same loss as {baselines[0]}, {within}."
    return f"Strategies do not change the loss: {len(names)} points agree with the first one of the same settings, {within}."


def _without_quality(jobs: Sequence[ComparedJob]) -> dict[str, str]:
    """{kind: sentence} that says why the quality of several jobs is not compared; with the seeds of the only one that is done."""
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
    """What the differences that are shown rest on; empty if none is shown, where the sentence on quality says it."""
    if not ranked.shown_worse:
        return ""
    one_seed = all(job.seeds == 1 for job in ranked.jobs)
    caveat = ", with one seed each: another seed may change it" if one_seed else ""
    return f"The order by {ranked.metric.name} rests on {listed(ranked.sources)}{caveat}."


def _quality_sentence(jobs: Sequence[ComparedJob], ranked: RankedJobs, differences: Sequence[SettingDifference]) -> str:
    """Which job is best on held-out data, in words, and which are not shown to be worse."""
    metric = ranked.metric
    best = ranked.best
    name = job_name(best, jobs, differences)
    value = readable(ranked.value(best))
    if not ranked.shown_worse:
        values = [ranked.value(job) for job in ranked.jobs]
        reason = "nothing says how far another seed, or other documents, would change it"
        if ranked.sources:
            reason = f"chance explains that much, judged by {listed(ranked.sources)}"
        return (
            f"No difference in {metric.name} shown between {len(values)} jobs: {readable(min(values))} to "
            f"{readable(max(values))} ({reason}). The {metric.word} is that of {name}."
        )
    sentence = f"{name} has the {metric.word} {metric.name}: {value}{_at_cost(best)}"
    equals = [job_name(job, jobs, differences) for job in ranked.not_shown_worse[1:]]
    worse = len(ranked.shown_worse)
    if equals:
        others = "the other is" if worse == 1 else f"the {worse} others are"
        return f"{sentence}. No difference shown from {listed(equals)}; {others} worse."
    others = "The other is" if worse == 1 else f"The {worse} others are"
    return f"{sentence}. {others} worse."


def job_name(job: ComparedJob, jobs: Sequence[ComparedJob], differences: Sequence[SettingDifference]) -> str:
    """What a job is called: its point's name, or the settings by which it differs from other jobs if it has several points."""
    if len(job.points) == 1:
        return job.points[0].name
    words = []
    for difference in differences:
        key = difference.key
        values = {short(other.settings.get(key, ABSENT)) for other in jobs}
        if len(values) > 1 and key in job.settings and not is_below(key, NOT_NAMED):
            words.append(setting_word(key, job.settings[key]))
    return " ".join(words) or job.points[0].name


def _at_cost(job: ComparedJob) -> str:
    """At which memory and speed a job ran, from the smallest to the largest of its points; empty if neither is known."""
    clauses = []
    points = [point for point in job.points if is_sound(point)]
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


def _best_quality(
    ranked: RankedJobs, pool: Sequence[ComparedRun], cheapest_names: Sequence[str], words_by_name: dict[str, str]
) -> list[TakeWhen]:
    """The point to take for the best value of the watched metric; none if no point of the best job can be recommended.

    If the job has several points, one that is recommended for its speed or memory is taken.
    """
    pool_names = {point.name for point in pool}
    points = [point for point in ranked.best.points if point.name in pool_names]
    if not points:
        return []
    best = min(points, key=lambda point: point.name not in cheapest_names)
    goal = f"the {ranked.metric.word} {ranked.metric.name}"
    return [TakeWhen(goal, best, readable(ranked.value(ranked.best)), words_by_name[best.name])]


def _cheapest(pool: Sequence[ComparedRun], words_by_name: dict[str, str]) -> tuple[str, list[TakeWhen]]:
    """(sentence on speed and memory, point to take for each), given `pool`: points of equal quality; ("", []) for one point."""
    if len(pool) < 2:
        return "", []
    single = "" if all(point.summary.repeats > 1 for point in pool) else "; one run each"
    take = []
    clauses = []
    not_shown = []
    fastest = _extreme(pool, lambda point: point.measured.tokens_per_s, speed_range, largest=True)
    if fastest is not None and fastest.is_shown:
        why = f"{fastest.point.measured.tokens_per_s:,.0f} tokens/s{single}{_equals_text(fastest)}"
        clauses.append(f"{fastest.point.name} is the fastest ({why})")
        take.append(TakeWhen("the most tokens/s", fastest.point, why, words_by_name[fastest.point.name]))
    elif fastest is not None:
        not_shown.append("speed")
    smallest = _extreme(pool, lambda point: point.measured.memory_gib, memory_range, largest=False)
    if smallest is not None and smallest.is_shown:
        why = f"{smallest.point.measured.memory_gib:.3g} GiB{_equals_text(smallest)}"
        clauses.append(f"{smallest.point.name} takes the least memory ({why})")
        take.append(TakeWhen("the least memory", smallest.point, why, words_by_name[smallest.point.name]))
    elif smallest is not None:
        not_shown.append("memory")
    if not_shown:
        clauses.append(f"no difference in {' or '.join(not_shown)} shown")
    if not clauses:
        return "", []
    sentence = "; ".join(clauses)
    if clauses[0].startswith("no "):
        sentence = f"N{sentence[1:]}"
    return f"{sentence}.", take


def is_speed_shown(points: Sequence[ComparedRun]) -> bool:
    """Whether any two of the points that can be recommended are shown to differ in speed."""
    sound = [point for point in points if is_sound(point)]
    fastest = _extreme(sound, lambda point: point.measured.tokens_per_s, speed_range, largest=True)
    return fastest is not None and fastest.is_shown


def is_memory_shown(points: Sequence[ComparedRun]) -> bool:
    """Whether any two of the points that can be recommended are shown to differ in memory."""
    sound = [point for point in points if is_sound(point)]
    smallest = _extreme(sound, lambda point: point.measured.memory_gib, memory_range, largest=False)
    return smallest is not None and smallest.is_shown


def _equals_text(extreme: _Extreme) -> str:
    """The points that are not shown to differ from the best one, in words; empty if there are none."""
    names = [point.name for point in extreme.equals]
    return f"; no difference shown from {listed(names)}" if names else ""


def _extreme(
    pool: Sequence[ComparedRun],
    value_of: Callable[[ComparedRun], float | None],
    range_of: Callable[[ComparedRun, bool], tuple[float, float] | None],
    *,
    largest: bool,
) -> _Extreme | None:
    """The point with the best cost, and which others overlap with it in range; None if fewer than two have value and range."""
    repeated = all(point.summary.repeats > 1 for point in pool)
    known = [point for point in pool if value_of(point) is not None and range_of(point, repeated) is not None]
    if len(known) < 2:
        return None
    choose = max if largest else min
    best = choose(known, key=lambda point: value_of(point) or 0.0)
    best_range = range_of(best, repeated)
    equals = []
    for point in known:
        own_range = range_of(point, repeated)
        if point is not best and best_range is not None and own_range is not None and overlap(best_range, own_range):
            equals.append(point)
    return _Extreme(best, equals, len(equals) < len(known) - 1)


def speed_range(point: ComparedRun, repeated: bool) -> tuple[float, float] | None:
    """From the slowest to the fastest repeat in tokens/s; of a single run the middle half of its steps.

    None for too few steps. `repeated`: whether all points have repeats.
    """
    if repeated and point.summary.spread is not None:
        return point.summary.spread
    counted_steps = point.measured.steps - point.measured.warmup_steps
    if not point.measured.warmup_steps or counted_steps < FEW_SPEED_STEPS:
        return None
    return point.measured.tokens_per_s_quartiles


def memory_range(point: ComparedRun, repeated: bool) -> tuple[float, float] | None:
    """From the smallest to the largest peak of the repeats in GiB, at least `MEMORY_TOLERANCE` wide."""
    peaks = point.summary.memory_gib_repeats if repeated else ()
    peak = point.measured.memory_gib
    if peak is None:
        return None
    is_cpu = point.first_repeat.record.device == "cpu"
    half = peak * (CPU_MEMORY_TOLERANCE if is_cpu else MEMORY_TOLERANCE) / 2
    return min([*peaks, peak - half]), max([*peaks, peak + half])


def overlap(first: tuple[float, float], second: tuple[float, float]) -> bool:
    """Whether two (low, high) ranges overlap."""
    return first[0] <= second[1] and second[0] <= first[1]


def _merged(choices: Sequence[TakeWhen]) -> list[TakeWhen]:
    """The choices, those for the same point put together in one, with a goal such as `the most tokens/s and the least memory`."""
    by_point: dict[str, TakeWhen] = {}
    for choice in choices:
        earlier = by_point.get(choice.point.name)
        if earlier is None:
            by_point[choice.point.name] = choice
            continue
        goal = f"{earlier.goal} and {choice.goal}"
        by_point[choice.point.name] = TakeWhen(goal, choice.point, f"{earlier.why}; {choice.why}", choice.words)
    return list(by_point.values())

"""Compares the held-out quality of points that train different jobs, and says whether their difference is shown.

A job is what a step computes: method, learning rate, precision, data. Points of one job differ in strategy alone, and have the
same quality. Two jobs differ for certain only if their difference is larger than what chance explains:

- points or repeats that differ in `run.seed` alone say by how much one job differs from itself;
- held-out documents, micro-batch by micro-batch in pairs, say how far the result depends on the documents chosen;
- intervals of `shardtune evaluate` say the same of a task's metric.

Of those that are known, all must agree. If none is known, no difference is shown. Repeats of one seed are no evidence: on a
deterministic machine they agree to the last digits, however much another seed would change.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from statistics import fmean, median, stdev
from typing import TYPE_CHECKING, Any

from launch.compare.curves import SAME_LOSS_TOLERANCE, step_settings
from launch.compare.run_files import RecordedRun, last_held_out_metrics
from strategies import atomic_io
from trainer.reporting.findings import findings_in
from trainer.reporting.results import EVALUATION, LAST_HELD_OUT, kept_reports
from trainer.reporting.run_record import MOST_BYTES

if TYPE_CHECKING:
    from launch.compare.compared_run import ComparedRun

DEFAULT_WATCH = "eval/loss"
LEVEL = 0.05
"""How often, at most, equal jobs are said to differ, over all pairs of a comparison together."""
MIN_BATCHES = 4
"""Micro-batches of held-out documents below which there is no interval.

With four of them, equal models are said to differ as rarely as with eight: 5 to 6 % of 6,000 made-up pairs at a level of 5 %.
"""
REWARD = "eval/reward"
REWARDS = "objective.rewards."
"""Prefix of the settings of rewards."""
TRAINING_ONLY = "objective.forgetting."
"""Prefix of settings of the objective that change no held-out loss."""
SMALLER_IS_BETTER = ("loss", "perplexity", "bits_per_byte", "calibration_error", "nll")
LARGER_IS_BETTER = (
    *("accuracy", "margin", "f1", "f1_macro", "f1_micro", "bleu", "chrf", "rouge1", "rouge2", "rougeL"),
    *("exact_match", "token_accuracy", "win_rate", "reward", "score"),
)
"""Names of metrics whose direction is known without asking the tasks that have them, which loads torch."""


@dataclass(frozen=True, slots=True)
class WatchedMetric:
    """The held-out metric by which a comparison judges quality."""

    name: str
    greater_is_better: bool

    @property
    def word(self) -> str:
        """What the best value of it is called."""
        return "highest" if self.greater_is_better else "lowest"


@dataclass(frozen=True)
class ComparedJob:
    """The points of a comparison that train the same job, apart from their seed."""

    points: tuple[ComparedRun, ...]
    settings: dict[str, Any]
    """What a step computes, by dotted key, without the seed."""

    @cached_property
    def done_runs(self) -> list[RecordedRun]:
        """The runs of all points and repeats that ended as they should: those that broke off are no measure of quality."""
        runs: list[RecordedRun] = []
        for point in self.points:
            runs += [run for run in point.repeated.repeats if run.ended is None and run.steps]
        return runs

    def values(self, metric: str) -> list[float]:
        """The metric at the last evaluation, one value for each seed: the median of its strategies and repeats.

        Runs without the metric are left out.
        """
        values_by_seed: dict[Any, list[float]] = {}
        for run in self.done_runs:
            value = last_held_out_metrics(run).get(metric)
            if value is not None and math.isfinite(value):
                values_by_seed.setdefault(run.config.get("run.seed"), []).append(value)
        return [median(values) for values in values_by_seed.values()]

    @cached_property
    def seeds(self) -> int:
        """How many seeds the done runs have together."""
        return len({run.config.get("run.seed") for run in self.done_runs})

    @property
    def is_broken(self) -> bool:
        """Whether a run that is done has diverged: such a job has no quality, whatever was measured before."""
        return any(_run_diverged(run) for run in self.done_runs)


@dataclass(frozen=True, slots=True)
class QualityDifference:
    """How the watched metric of one job differs from that of a better one, and what is known of chance."""

    relative: float
    """(value - better value) / |better value|: positive for a loss that is higher."""
    seeds: int
    """Seeds of the job that has more of them."""
    seed_interval: tuple[float, float] | None = None
    """Of `relative`, over seeds; None if both jobs have one seed, or if their seeds differ by rounding alone."""
    interval: tuple[float, float] | None = None
    """Of `relative`, over held-out documents; None if it is not known."""
    beyond_reports: bool | None = None
    """Whether the intervals of `shardtune evaluate` are apart; None if it did not evaluate both."""

    @property
    def is_shown(self) -> bool:
        """Whether the difference is real: no interval (over seeds, over documents, of reports) allows for chance alone."""
        evidence = [] if self.beyond_reports is None else [self.beyond_reports]
        for interval in (self.seed_interval, self.interval):
            if interval is not None:
                low, high = interval
                # An interval on the other side of zero is evidence for the opposite.
                evidence.append(low > 0 if self.relative > 0 else high < 0)
        # Rounding alone differs by less.
        return abs(self.relative) > SAME_LOSS_TOLERANCE and bool(evidence) and all(evidence)

    @property
    def sources(self) -> list[str]:
        """What the judgement rests on, as nouns; empty if nothing is known of chance."""
        sources = []
        if self.interval is not None:
            sources.append("held-out documents")
        if self.seed_interval is not None:
            sources.append("seeds")
        if self.beyond_reports is not None:
            sources.append("intervals of shardtune evaluate")
        return sources

    @property
    def evidence_text(self) -> str:
        """What the judgement rests on, with its numbers; empty if on nothing."""
        clauses = []
        if self.interval is not None:
            low, high = self.interval
            clauses.append(f"95 % interval over held-out documents {low:+.2%} to {high:+.2%}")
        if self.seed_interval is not None:
            low, high = self.seed_interval
            clauses.append(f"95 % interval over {self.seeds} seeds {low:+.2%} to {high:+.2%}")
        if self.beyond_reports is not None:
            word = "apart" if self.beyond_reports else "overlap"
            clauses.append(f"intervals of shardtune evaluate {word}")
        return "; ".join(clauses)


@dataclass(frozen=True)
class RankedJobs:
    """The jobs of a comparison, the best first, by one held-out metric."""

    metric: WatchedMetric
    jobs: list[ComparedJob]
    differences: list[QualityDifference | None] = field(default_factory=list)
    """Of each job from the best one; None for the best."""

    def value(self, job: ComparedJob) -> float:
        """The metric of a job: the median of its seeds."""
        return median(job.values(self.metric.name))

    @property
    def best(self) -> ComparedJob:
        """The job with the best value."""
        return self.jobs[0]

    @property
    def not_shown_worse(self) -> list[ComparedJob]:
        """The best job, and those whose difference from it is not shown."""
        return [job for job, difference in zip(self.jobs, self.differences, strict=True) if not _is_shown(difference)]

    @property
    def shown_worse(self) -> list[ComparedJob]:
        """The jobs that are worse than the best one for certain."""
        return [job for job, difference in zip(self.jobs, self.differences, strict=True) if _is_shown(difference)]

    @property
    def sources(self) -> list[str]:
        """What the answer rests on, as nouns: of the differences that are shown, or of all if none is; empty if on nothing."""
        known = [difference for difference in self.differences if difference is not None]
        shown = [difference for difference in known if difference.is_shown]
        sources: dict[str, None] = {}
        for difference in shown or known:
            sources |= dict.fromkeys(difference.sources)
        return list(sources)


def _is_shown(difference: QualityDifference | None) -> bool:
    return difference is not None and difference.is_shown


def diverged(point: ComparedRun) -> bool:
    """Whether any repeat's losses ended worse than they began, or are no numbers."""
    return any(_run_diverged(run) for run in point.repeated.repeats)


def _run_diverged(run: RecordedRun) -> bool:
    if "diverged" in {finding.name for finding in findings_in(run.record.challenges)}:
        return True
    return bool(run.steps) and run.steps[max(run.steps)]["loss"] is None


def jobs_of(points: Sequence[ComparedRun]) -> list[ComparedJob]:
    """The points that took a step, grouped into jobs: points of a job have equal settings but for seed and strategy."""
    points_by_key: dict[str, list[ComparedRun]] = {}
    settings_by_key: dict[str, dict[str, Any]] = {}
    for point in points:
        if not point.measured.steps:
            continue
        settings = step_settings(point.first_repeat)
        settings.pop("run.seed", None)
        key = json.dumps(settings, sort_keys=True, default=str)
        points_by_key.setdefault(key, []).append(point)
        settings_by_key[key] = settings
    return [ComparedJob(tuple(points), settings_by_key[key]) for key, points in points_by_key.items()]


def watched_metric(jobs: Sequence[ComparedJob]) -> WatchedMetric | None:
    """The metric by which quality is compared: `evaluation.watch` if every job has it, else the held-out loss; None without.

    It is never a metric of the test documents: who chooses by them has none left to measure the choice with.
    """
    if not jobs:
        return None
    first_run = jobs[0].points[0].first_repeat
    for name in (str(first_run.config.get("evaluation.watch") or DEFAULT_WATCH), DEFAULT_WATCH):
        if name.startswith("test/"):
            continue
        if all(job.values(name) or job.is_broken or not job.done_runs for job in jobs):
            larger = watched_direction(first_run, name)
            if larger is not None and any(job.values(name) for job in jobs):
                return WatchedMetric(name, larger)
    return None


def watched_metric_name(points: Sequence[ComparedRun]) -> str | None:
    """The name of the watched metric of any of the points; None if no point has a held-out metric by which to judge."""
    metric = watched_metric(jobs_of(points))
    if metric is not None:
        return metric.name
    return DEFAULT_WATCH if any(DEFAULT_WATCH in point.measured.after for point in points) else None


def watched_direction(run: RecordedRun, name: str) -> bool | None:
    """Whether a larger value of the watched metric is better, as the run recorded it, its settings say, or its name."""
    outcome = run.record.outcome
    if outcome is not None and outcome.watch == name and outcome.greater_is_better is not None:
        return outcome.greater_is_better
    configured = run.config.get("evaluation.greater_is_better")
    if configured is not None and run.config.get("evaluation.watch") == name:
        return bool(configured)
    return direction_of(name)


def direction_of(name: str) -> bool | None:
    """Whether a larger value of a metric is better, by its name; None if the name does not tell."""
    parts = name.split("/")
    if "loss" in parts[1:2] or parts[0] == "forgetting":
        return False
    if parts[-1] in SMALLER_IS_BETTER:
        return False
    return True if parts[-1] in LARGER_IS_BETTER else None


def comparable_jobs(jobs: Sequence[ComparedJob], metric: WatchedMetric) -> list[ComparedJob]:
    """The jobs that have the metric, and were asked the same as the first one of them."""
    measured = [job for job in jobs if job.values(metric.name) and not job.is_broken]
    comparable = []
    for job in measured:
        first_run = measured[0].points[0].first_repeat
        if why_other_questions(first_run, job.points[0].first_repeat, metric.name) is None:
            comparable.append(job)
    return comparable


def pairwise_level(number_of_jobs: int) -> float:
    """The level of each test if all pairs of the jobs are tested: the best was chosen among all, so every pair counts."""
    pairs = number_of_jobs * (number_of_jobs - 1) // 2
    return LEVEL / max(1, pairs)


def rank(jobs: Sequence[ComparedJob], metric: WatchedMetric) -> RankedJobs | None:
    """The jobs that can be compared by the metric, the best first; None if fewer than two can be."""
    comparable = comparable_jobs(jobs, metric)
    if len(comparable) < 2:
        return None
    sign = -1 if metric.greater_is_better else 1
    ranked = sorted(comparable, key=lambda job: sign * median(job.values(metric.name)))
    level = pairwise_level(len(ranked))
    differences: list[QualityDifference | None] = [None]
    differences += [quality_difference(ranked[0], job, metric.name, level) for job in ranked[1:]]
    return RankedJobs(metric, ranked, differences)


def quality_difference(baseline: ComparedJob, job: ComparedJob, metric: str, level: float = LEVEL) -> QualityDifference:
    """How a metric of `job` differs from that of `baseline`, with all evidence on chance. `level`: of each two-sided test."""
    reference = median(baseline.values(metric))
    relative = (median(job.values(metric)) - reference) / (abs(reference) or 1.0)
    return QualityDifference(
        relative=relative,
        seeds=max(baseline.seeds, job.seeds),
        seed_interval=_seed_interval(baseline, job, metric, level),
        interval=_document_interval(baseline, job, metric, level),
        beyond_reports=_reports_apart(baseline, job, metric, relative),
    )


def _seed_interval(baseline: ComparedJob, job: ComparedJob, metric: str, level: float) -> tuple[float, float] | None:
    """Interval of the relative difference of a metric between the means over seeds, by Student's test with equal variances.

    None without two seeds of either job, and if no seed differs by more than rounding: such seeds are like repeats.
    """
    from trainer.monitors.forgetting import student_quantile

    old_values = baseline.values(metric)
    new_values = job.values(metric)
    freedom = len(old_values) + len(new_values) - 2
    if freedom < 1:
        return None
    old_mean = fmean(old_values)
    new_mean = fmean(new_values)
    scale = abs(median(old_values)) or 1.0
    deviations = [value - old_mean for value in old_values]
    deviations += [value - new_mean for value in new_values]
    squares = math.fsum(value**2 for value in deviations)
    deviation = math.sqrt(squares / freedom) / scale
    if deviation <= SAME_LOSS_TOLERANCE:
        return None
    relative = (new_mean - old_mean) / scale
    error = deviation * math.sqrt(1 / len(old_values) + 1 / len(new_values))
    margin = student_quantile(1 - level / 2, freedom) * error
    return relative - margin, relative + margin


def why_other_questions(baseline: RecordedRun, run: RecordedRun, metric: str) -> str | None:
    """The settings because of which a metric was measured in two different ways, so that its values cannot be compared.

    None if both runs were evaluated alike: the same documents, tokens, loss and scoring, as far as this metric needs them.
    """
    parts = metric.split("/")
    task_prefix = f"evaluation.tasks.{parts[1]}." if len(parts) == 3 else None
    if task_prefix is not None and any(key.startswith(task_prefix) for key in baseline.config):
        keys = {key for key in {*baseline.config, *run.config} if key.startswith(task_prefix)}
        # A task without a file of its own asks the evaluation documents.
        if baseline.config.get(f"{task_prefix}path") is not None:
            return _differing(baseline, run, keys)
    if direction_of(metric) is False or parts[-1] == "margin":
        # A loss is the objective's own: that of another objective, or of another beta, is another quantity.
        objective_keys = {key for key in {*baseline.config, *run.config} if key.startswith("objective.")}
        own_keys = {key for key in objective_keys if not key.startswith(TRAINING_ONLY)}
        objective = _differing(baseline, run, own_keys)
        if objective is not None:
            return objective
    if metric == REWARD or metric.startswith("eval/pass_at_"):
        scoring = _differing(baseline, run, _keys_of_scoring(baseline) | _keys_of_scoring(run))
        if scoring is not None:
            return scoring
    fingerprints = {each.identity.get("data", {}).get("fingerprint") for each in (baseline, run)}
    limits = _differing(baseline, run, {"evaluation.max_documents"})
    if limits is not None:
        return limits
    if len(fingerprints) == 1 and None not in fingerprints:
        return None
    # A loss is of tokens: with another tokenizer it is of other units, whatever the documents are.
    keys = {"data.eval_path", "data.eval_share", "model.tokenizer", "model.chat_template", "data.max_length"}
    if None in fingerprints or not baseline.config.get("data.eval_path"):
        keys |= {"data.path", "run.seed"}
    if baseline.config.get("model.tokenizer") is None:
        keys |= {"model.path"}
    return _differing(baseline, run, keys)


def _keys_of_scoring(run: RecordedRun) -> set[str]:
    """Settings that decide what `eval/reward` says of an answer: the rewards that count, and where an answer is cut off."""
    keys = {"objective.rollout.max_new_tokens", "objective.rollout.stop"}
    for key in run.config:
        if not key.startswith(REWARDS) or key.endswith(".timeout_s"):
            continue
        name = key.removeprefix(REWARDS).partition(".")[0]
        # A control is measured beside, and changes no score.
        if run.config.get(f"{REWARDS}{name}.weight") != 0:
            keys.add(key)
    return keys


def _differing(baseline: RecordedRun, run: RecordedRun, keys: set[str]) -> str | None:
    """The keys whose values differ between two runs, as words; None if none does."""
    names = [key for key in sorted(keys) if baseline.config.get(key) != run.config.get(key)]
    return ", ".join(names) or None


def _document_interval(
    baseline: ComparedJob, job: ComparedJob, metric: str, level: float
) -> tuple[float, float] | None:
    """Interval of the relative difference of a metric, from pairs of micro-batches with the same held-out documents.

    None if the runs kept no sums of the metric, if their micro-batches are other ones, or too few.
    """
    from trainer.monitors.forgetting import ratio_error, student_quantile

    baseline_run = baseline.done_runs[0]
    run = job.done_runs[0]
    if _differing(baseline_run, run, {"evaluation.batch", "evaluation.max_documents"}) is not None:
        return None
    pairs = _paired_sums(baseline_run, run, metric)
    if pairs is None:
        return None
    old_sums = [old for old, _ in pairs]
    new_sums = [new for _, new in pairs]
    total = math.fsum(old_sums)
    if len(pairs) < MIN_BATCHES or not total:
        return None
    quantile = student_quantile(1 - level / 2, len(pairs) - 1)
    if metric == DEFAULT_WATCH:
        relative = (math.fsum(new_sums) - total) / total
        margin = quantile * ratio_error(old_sums, new_sums)
        return relative - margin, relative + margin
    changes = [new - old for old, new in pairs]
    scale = abs(total) / len(pairs)
    margin = quantile * stdev(changes) / math.sqrt(len(pairs)) / scale
    return fmean(changes) / scale - margin, fmean(changes) / scale + margin


def _paired_sums(baseline: RecordedRun, run: RecordedRun, metric: str) -> list[tuple[float, float]] | None:
    """(sum of the baseline, sum of the run) of a metric over each micro-batch of their last evaluations; None if not kept."""
    old_sums = _kept_sums(baseline, metric)
    new_sums = _kept_sums(run, metric)
    if old_sums is None or new_sums is None:
        return None
    # Another number of ranks has another number of empty micro-batches at the end, which sum to 0.
    common = min(len(old_sums), len(new_sums))
    if any(old_sums[common:]) or any(new_sums[common:]):
        return None
    pairs = [(old, new) for old, new in zip(old_sums, new_sums, strict=False) if old or new]
    return pairs if all(math.isfinite(old) and math.isfinite(new) for old, new in pairs) else None


def _kept_sums(run: RecordedRun, metric: str) -> list[float] | None:
    """The sums of a metric over each micro-batch of the run's last evaluation; None if the run did not keep them."""
    try:
        kept = json.loads(atomic_io.read_bytes(run.directory / LAST_HELD_OUT, max_bytes=MOST_BYTES))
        if kept["step"] != max(run.evaluations, default=0):
            return None  # of an evaluation whose row was lost
        return [float(batch_sum) for batch_sum in kept["batches"][metric]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _reports_apart(baseline: ComparedJob, job: ComparedJob, metric: str, relative: float) -> bool | None:
    """Whether the intervals of a task's metric in the newest evaluation reports of both jobs are apart, on the side that
    the relative difference is on; None if not known.
    """
    first = _reported_interval(baseline.done_runs[0], metric)
    second = _reported_interval(job.done_runs[0], metric)
    if first is None or second is None:
        return None
    return first[1] < second[0] if relative > 0 else second[1] < first[0]


def _reported_interval(run: RecordedRun, metric: str) -> tuple[float, float] | None:
    """(low, high) of a task's metric in the newest report of `shardtune evaluate` on the run's last weights; None without."""
    parts = metric.split("/", 2)
    if len(parts) != 3:
        return None
    for kept in kept_reports(run.directory, EVALUATION):
        try:
            record = kept.report["tasks"][parts[1]]["metrics"][parts[2]]
            # A report may be of another checkpoint: then its value is another one.
            if math.isclose(record["value"], last_held_out_metrics(run)[metric], rel_tol=1e-6):
                return float(record["low"]), float(record["high"])
        except (KeyError, TypeError, ValueError):
            continue
    return None

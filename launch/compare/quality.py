"""Ranks the jobs of a comparison by their quality on held-out data.

`quality_evidence.py` says whether the difference of two jobs counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING

from launch.compare.compared_job import ComparedJob, group_points_into_jobs
from launch.compare.metric_meaning import HELD_OUT_LOSS, greater_is_better_in_run, keys_measured_differently
from launch.compare.quality_evidence import SIGNIFICANCE_LEVEL, QualityDifference, quality_difference

if TYPE_CHECKING:
    from launch.compare.compared_point import ComparedPoint


@dataclass(frozen=True, slots=True)
class QualityMetric:
    """The held-out metric by which a comparison judges quality."""

    name: str
    greater_is_better: bool

    @property
    def superlative(self) -> str:
        """What the best value of the metric is called."""
        return "highest" if self.greater_is_better else "lowest"


@dataclass(frozen=True)
class RankedJobs:
    """The jobs of a comparison, the best first, by one held-out metric."""

    metric: QualityMetric
    jobs: list[ComparedJob]
    differences: list[QualityDifference | None] = field(default_factory=list)
    """For each of `jobs`, its difference from the best job; None for the best job itself."""

    def value(self, job: ComparedJob) -> float:
        """The metric of a job: the median over its seeds."""
        return median(job.value_of_each_seed(self.metric.name))

    @property
    def best(self) -> ComparedJob:
        """The job with the best value."""
        return self.jobs[0]

    @property
    def not_significantly_worse(self) -> list[ComparedJob]:
        """The best job, and the jobs whose difference from it is not significant."""
        return [
            job for job, difference in zip(self.jobs, self.differences, strict=True) if not _is_significant(difference)
        ]

    @property
    def significantly_worse(self) -> list[ComparedJob]:
        """The jobs whose difference from the best one is significant."""
        return [job for job, difference in zip(self.jobs, self.differences, strict=True) if _is_significant(difference)]

    @property
    def evidence_sources(self) -> list[str]:
        """What the ranking rests on, as nouns for a sentence: ["seeds", "held-out documents"], each once.

        Empty if there is no evidence. The evidence is that of the significant differences, or of all differences if none is
        significant.
        """
        differences = [difference for difference in self.differences if difference is not None]  # the best job has none
        significant_differences = [difference for difference in differences if difference.is_significant]
        nouns: dict[str, None] = {}  # a dict as an ordered set
        for difference in significant_differences or differences:
            nouns |= dict.fromkeys(difference.evidence_sources)
        return list(nouns)


def _is_significant(difference: QualityDifference | None) -> bool:
    return difference is not None and difference.is_significant


def quality_metric(jobs: Sequence[ComparedJob]) -> QualityMetric | None:
    """Choose the held-out metric by which the quality of the jobs is compared; None if none can be used.

    A job is all points that train the same. The metric is `evaluation.watch` of the first job or, if that cannot be used,
    the held-out loss. A metric can be used if

    - every job has it, except jobs that diverged and jobs without a run that is done, and at least one job has it,
    - it is known whether a larger value is better,
    - it is no metric of the test documents: whoever chooses by them cannot measure the choice with them any more.
    """
    if not jobs:
        return None
    first_run = jobs[0].points[0].first_repeat
    watched_metric = str(first_run.config.get("evaluation.watch") or HELD_OUT_LOSS)
    for name in (watched_metric, HELD_OUT_LOSS):
        if name.startswith("test/"):
            continue
        any_has_it = any(job.value_of_each_seed(name) for job in jobs)
        all_have_it = all(job.value_of_each_seed(name) or job.has_diverged or not job.done_runs for job in jobs)
        if any_has_it and all_have_it:
            greater_is_better = greater_is_better_in_run(first_run, name)
            if greater_is_better is not None:
                return QualityMetric(name, greater_is_better)
    return None


def quality_metric_name(points: Sequence[ComparedPoint]) -> str | None:
    """The name of the held-out metric that tables and plots of these points show first. The first case that applies:

    - The metric by which the jobs of the points are compared, if there is one (`quality_metric`).
    - The held-out loss, if any point has it.
    - Otherwise None.
    """
    metric = quality_metric(group_points_into_jobs(points))
    if metric is not None:
        return metric.name
    return HELD_OUT_LOSS if any(HELD_OUT_LOSS in point.measured.metrics_at_end for point in points) else None


def comparable_jobs(jobs: Sequence[ComparedJob], metric: QualityMetric) -> list[ComparedJob]:
    """The jobs that a ranking by this metric can contain, because they measured it alike.

    Left out are jobs without the metric, jobs that diverged, and jobs that measured it otherwise than the first remaining
    job.
    """
    measured_jobs = [job for job in jobs if job.value_of_each_seed(metric.name) and not job.has_diverged]
    if not measured_jobs:
        return []
    reference_run = measured_jobs[0].points[0].first_repeat
    comparable = []
    for job in measured_jobs:
        if not keys_measured_differently(reference_run, job.points[0].first_repeat, metric.name):
            comparable.append(job)
    return comparable


def bonferroni_level(num_jobs: int) -> float:
    """The significance level for each single test if all pairs of these jobs are tested, by the Bonferroni correction.

    Every pair counts, because the best job was chosen among all of them.
    """
    num_pairs = num_jobs * (num_jobs - 1) // 2
    return SIGNIFICANCE_LEVEL / max(1, num_pairs)  # a single job makes no pair


def rank_jobs_by_quality(jobs: Sequence[ComparedJob], metric: QualityMetric) -> RankedJobs | None:
    """Rank the jobs by a held-out metric, the best first, and test how each differs from the best.

    The value of a job is the median over its seeds. None if fewer than two jobs can be compared.
    """
    comparable = comparable_jobs(jobs, metric)
    if len(comparable) < 2:
        return None
    ranked = sorted(
        comparable, key=lambda job: median(job.value_of_each_seed(metric.name)), reverse=metric.greater_is_better
    )
    # The more pairs of jobs are tested, the stricter each single test.
    significance_level = bonferroni_level(len(ranked))
    differences: list[QualityDifference | None] = [None]  # the best job has no difference from itself
    differences += [quality_difference(ranked[0], job, metric.name, significance_level) for job in ranked[1:]]
    return RankedJobs(metric, ranked, differences)

"""Rules between gates and the rest of a configuration: a gate must name a metric that one of the tasks has."""

from __future__ import annotations

import difflib
from collections.abc import Iterator

from trainer.config.run import RunConfig
from trainer.evaluation.tasks.registry import TASK_KINDS
from trainer.export.gates import bounds
from trainer.reporting.documents.questions import paper_problems, read_answers


def paper_words(config: RunConfig) -> Iterator[str]:
    """What is wrong with the papers that are asked for, and with the answers in them, one line each."""
    yield from paper_problems(config.export.papers)
    yield from read_answers(config.export.answers)[1]


def problems(config: RunConfig) -> Iterator[str]:
    """What is wrong with the gates, one line each. Metrics of tasks that are not configured may be measured later."""
    yield from bounds.problems(config.gates)
    for bound in bounds.bounds_of(config.gates):
        task, _, metric = bound.metric.removeprefix("eval/").partition("/")
        there: list[str] = []
        if task in config.evaluation.tasks and metric:
            asked = config.evaluation.tasks[task]
            kind = TASK_KINDS.get(asked.kind)
            there = [] if kind is None else [each.name for each in kind(task, asked).metrics]
        if there and metric.partition("/")[0] not in there:
            near = difflib.get_close_matches(metric, there, n=1)
            known = (
                f"did you mean {bound.metric.removesuffix(metric)}{near[0]}?" if near else f"it has {', '.join(there)}"
            )
            yield f"gates: {bound.metric}: the task {task} has no such metric; {known}"

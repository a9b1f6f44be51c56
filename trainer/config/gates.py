"""Rules between gates and the rest of a configuration: a gate must name a metric that one of the tasks has."""

from __future__ import annotations

import difflib
from collections.abc import Iterator

from trainer.config.run import RunConfig
from trainer.evaluation.tasks.registry import TASK_KINDS
from trainer.export.gates import bounds
from trainer.reporting.documents.questions import paper_problems, read_answers


def document_problems(config: RunConfig) -> Iterator[str]:
    """Check the compliance documents that an export is to have (`export.papers`), and the owner's answers for them.

    Yields error messages.
    """
    yield from paper_problems(config.export.papers)
    yield from read_answers(config.export.answers)[1]


def gate_problems(config: RunConfig) -> Iterator[str]:
    """Check the gates: bounds that metrics must keep before a model may be exported, such as {"qa/accuracy": ">0.6"}.

    Yields error messages. A gate on a metric of a configured task must name one that the task has. Any other metric may be
    measured later.
    """
    yield from bounds.gate_problems(config.gates)
    for bound in bounds.parse_gate_bounds(config.gates):
        task_name, _, metric = bound.metric.removeprefix("eval/").partition("/")
        task_config = config.evaluation.tasks.get(task_name)
        if task_config is None or not metric:  # the metric of no task, or of one that is not configured
            continue
        kind = TASK_KINDS.get(task_config.kind)
        metrics = [] if kind is None else [declared.name for declared in kind(task_name, task_config).metrics]
        # A metric may have parts that only the rows tell: of `acc/arc_easy` the task declares `acc`.
        if not metrics or metric.partition("/")[0] in metrics:
            continue
        similar = difflib.get_close_matches(metric, metrics, n=1)
        hint = f"it has {', '.join(metrics)}"
        if similar:
            hint = f"did you mean {bound.metric.removesuffix(metric)}{similar[0]}?"
        yield f"gates: {bound.metric}: the task {task_name} has no such metric; {hint}"

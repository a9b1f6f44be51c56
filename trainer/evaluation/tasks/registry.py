"""Every kind of task by its name."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from importlib.util import find_spec

from strategies.extras import install_command
from trainer.evaluation.base import TaskConfig
from trainer.evaluation.tasks import (
    bbq,
    choice,
    classification,
    counterfactual,
    harness,
    held_out,
    judged,
    memorised,
    personal,
    preference,
    refusal,
    stereotype,
    structured,
    subgroups,
    toxicity,
    written,
)
from trainer.evaluation.tasks.base import Task

TASK_KINDS: dict[str, type[Task]] = {
    task.kind: task
    for task in (
        held_out.Loss,
        held_out.BitsPerByte,
        held_out.TokenAccuracy,
        written.ExactMatch,
        written.F1,
        written.Translation,
        written.Summarisation,
        classification.ClassificationTask,
        choice.MultipleChoice,
        structured.ToolCalls,
        structured.JsonSchema,
        structured.Maths,
        judged.GradedTask,
        preference.PreferenceTask,
        memorised.Memorisation,
        memorised.Canary,
        memorised.Membership,
        personal.PersonalDataTask,
        counterfactual.Counterfactual,
        subgroups.Subgroups,
        stereotype.Stereotype,
        bbq.Bbq,
        toxicity.Toxicity,
        refusal.Refusals,
        harness.Harness,
    )
}
"""All kinds by name, in the order in which users see them."""
TASK_KINDS |= {"rouge": written.Summarisation, "bleu": written.Translation}  # by the metric that they are known for

HINT_BY_AMBIGUOUS_KIND = {
    "accuracy": "did you mean classification (share of rows whose label is right), exact_match (share of answers that are right "
    "word for word), multiple_choice (share of right choices), or token_accuracy (share of tokens predicted right)?"
}
"""Names that users try, and that may mean several kinds. The most similar name would measure something else."""


def build_tasks(tasks: Mapping[str, TaskConfig]) -> list[Task]:
    """The tasks of a configuration that was checked, in its order."""
    return [TASK_KINDS[config.kind](name, config) for name, config in tasks.items()]


def asks_judge(config: TaskConfig) -> bool:
    """Whether a task asks the judge of `evaluation.judge`."""
    kind = TASK_KINDS.get(config.kind)
    if kind is None or kind is harness.Harness:  # making a task of lm_eval would read the harness's files
        return False
    return kind("", config).needs_judge


def reads_rows_of_run(config: TaskConfig) -> bool:
    """Whether a task reads rows of the run's own data, so that this data must be prepared before the task can run."""
    kind = TASK_KINDS.get(config.kind)
    if kind is None or kind.split == "both":
        return True
    return config.path is None and not kind.loads_own_rows and kind.shipped_rows is None


def task_problems(tasks: Mapping[str, TaskConfig]) -> Iterator[str]:
    """Yield an error message for each invalid setting under `evaluation.tasks`, before anything starts; reads no rows."""
    for name, config in tasks.items():
        task_key = f"evaluation.tasks.{name}"
        # Letters, digits, `-` and `_`, and no digit at the beginning.
        if not name.replace("-", "_").isidentifier():
            yield f"{task_key}: the name stands in metrics (eval/{name}/...); use letters, digits, - and _"
        if not config.kind:
            yield f"{task_key}.kind: not set; say what is measured: one of {', '.join(TASK_KINDS)}"
            continue
        if config.kind not in TASK_KINDS:
            yield f"{task_key}.kind={config.kind}: there is no such kind of task; {_kind_hint(config.kind)}"
            continue
        task = TASK_KINDS[config.kind](name, config)
        yield from task.problems()
        if task.required_package is not None and find_spec(task.required_package) is None:
            yield f"{task_key}.kind={config.kind}: needs {task.required_package}; {install_command(task.pip_extra)}"


def _kind_hint(unknown_kind: str) -> str:
    """Which kind may be meant by a name that is none: kinds known by that name elsewhere, the most similar one, or all kinds."""
    if unknown_kind in HINT_BY_AMBIGUOUS_KIND:
        return HINT_BY_AMBIGUOUS_KIND[unknown_kind]
    similar = difflib.get_close_matches(unknown_kind, TASK_KINDS, n=1)
    return f"did you mean {similar[0]}?" if similar else f"one of {', '.join(TASK_KINDS)}"


def metric_directions(tasks: Mapping[str, TaskConfig]) -> dict[str, bool | None]:
    """Whether greater is better, by the full name of each metric of these tasks: {"eval/facts/f1": True}; None if neither is."""
    directions = {}
    for name, config in tasks.items():
        if config.kind not in TASK_KINDS:
            continue
        for metric in TASK_KINDS[config.kind](name, config).metrics:
            directions[f"eval/{name}/{metric.name}"] = metric.greater_is_better
    return directions

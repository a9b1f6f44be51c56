"""Rules between evaluation and other settings: its data, an objective that can do its tasks, a metric that exists."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

from strategies.errors import ShardtuneError
from trainer.config.run import RunConfig
from trainer.data.config import DataFormat
from trainer.data.read.paths import expand_paths
from trainer.evaluation.base import DecodingConfig, TaskConfig
from trainer.evaluation.interval import AUTO
from trainer.evaluation.tasks import registry
from trainer.export.config import ExportedCheckpoint
from trainer.model.config import ModelKind
from trainer.monitors.config import (
    ANSWER_TOKENS,
    ANSWERED_QUESTIONS,
    CHAT_ANSWERS_TASK,
    CHAT_QUESTIONS,
    CHAT_TASK,
    GENERAL_TEXT_TASK,
    Reaction,
    forgetting_limit,
)
from trainer.objectives.registry import FAMILIES, build_objective, objective_family
from trainer.objectives.rollouts import RoundsConfig

FORGETTING_METRIC_NAMES = ("forgetting",)
"""What `challenges.forgetting` yields; less is better."""
REWARD_METRIC_PREFIXES = ("eval/reward", "eval/pass_at_")
"""Beginnings of the metrics of objectives whose batches are rounds; more is better."""
GENERATION_METRICS = ("eval/bleu", "eval/rougeL")
"""Metrics of answers that are generated; more is better."""


def evaluation_problems(config: RunConfig) -> Iterator[str]:
    """Check before a run starts that `evaluation` can work: its data, its schedule, the metric to watch, its tasks.

    Yields an error message for each problem. Looks for files, but reads no rows.
    """
    evaluation = config.evaluation
    has_data = config.data.eval_path is not None or config.data.eval_share > 0
    has_general = config.challenges.forgetting.data is not None or bool(config.challenges.forgetting.chat)
    has_anything = has_data or has_general or bool(evaluation.tasks)

    # Settings that need something to be evaluated, or a schedule.
    for key in ("every_steps", "patience"):
        evaluations = getattr(evaluation, key)
        if isinstance(evaluations, int) and evaluations > 0 and not has_anything:
            yield (
                f"evaluation.{key}={evaluations}: there is no evaluation data; give data.eval_path or data.eval_share=0.05, or "
                "set it to 0"
            )
    if config.export.checkpoint is ExportedCheckpoint.best and not has_anything:
        yield (
            "export.checkpoint=best: nothing is evaluated that could say which is the best; give data.eval_path or "
            "data.eval_share=0.05, or leave it out"
        )
    if evaluation.patience > 0 and evaluation.every_steps == 0:
        yield f"evaluation.patience={evaluation.patience}: counts evaluations; set evaluation.every_steps as well"
    elif (
        evaluation.patience > 0
        and evaluation.every_steps == AUTO
        and has_anything
        and not watches_held_out_loss(config)
    ):
        yield (
            f"evaluation.patience={evaluation.patience}: counts evaluations of {evaluation.watched}, which "
            "evaluation.every_steps=auto makes at the start and at the end alone; give evaluation.every_steps a number of steps"
        )

    # The metric to watch.
    if evaluation.watched.startswith("test/"):
        yield (
            f"evaluation.watch={evaluation.watched}: the test documents are measured once, when training has ended, and nothing "
            "may be chosen by them; watch a metric of the evaluation documents, such as eval/loss"
        )
    elif not re.fullmatch(r"eval/[\w./-]+", evaluation.watched) and evaluation.watched not in FORGETTING_METRIC_NAMES:
        yield f"evaluation.watch={evaluation.watched}: must name an evaluation metric, such as eval/loss or eval/accuracy"
    elif evaluation.greater_is_better not in (None, is_greater_better(config)):
        value = str(evaluation.greater_is_better).lower()
        correct_value = str(is_greater_better(config)).lower()
        better_value = "larger" if is_greater_better(config) else "smaller"
        yield (
            f"evaluation.greater_is_better={value}: with evaluation.watch={evaluation.watched} a {better_value} value is "
            f"better; leave it out, or set it to {correct_value}"
        )
    if evaluation.tasks or has_general:
        yield from _watched_task_problems(config, has_data=has_data)
    yield from _task_problems(config)
    yield from _forgetting_problems(config)
    yield from _generation_problems(config, has_data=has_data)
    is_of_task = evaluation.watched in registry.metric_directions(evaluation.tasks)
    is_f1 = evaluation.watched.rpartition("/")[2].startswith("f1_")
    if is_f1 and not is_of_task and not objective_family(config.objective).scores_labels:
        yield f"evaluation.watch={evaluation.watched}: only classifiers have it; watch eval/loss or eval/accuracy"


def watches_held_out_loss(config: RunConfig) -> bool:
    """Whether the watched metric is cheap to measure: by a forward pass over evaluation documents, as `eval/loss` is.

    With `evaluation.every_steps=auto`, only such a metric is measured during training; others at its start and end alone. False
    for metrics of generated answers and of tasks, and without evaluation documents (`data.eval_path` or `data.eval_share`).
    """
    if isinstance(config.objective, RoundsConfig):
        return False  # all metrics of such an objective are of generated answers
    watch = config.evaluation.watched
    has_data = config.data.eval_path is not None or config.data.eval_share > 0
    task_metrics = registry.metric_directions(tasks_to_run(config))
    needs_generation_or_task = (
        watch in (*GENERATION_METRICS, *FORGETTING_METRIC_NAMES)
        or watch.startswith(REWARD_METRIC_PREFIXES)
        or watch in task_metrics
    )
    return has_data and not needs_generation_or_task


def is_greater_better(config: RunConfig) -> bool:
    """Whether a larger value of the watched metric is better, which decides what the best checkpoint is. The first that applies:

    - a metric of a task: what the task declares;
    - a metric of rewards: yes;
    - a loss: no;
    - otherwise yes for BLEU and ROUGE, and for metrics of which an objective declares it.
    """
    watch = config.evaluation.watched
    larger_by_task = registry.metric_directions(tasks_to_run(config)).get(watch)
    if larger_by_task is not None:
        return larger_by_task
    if watch.startswith(REWARD_METRIC_PREFIXES):
        return True
    # The name of a named set of evaluation documents stands before the metric's: eval/chat/rougeL, but eval/loss/chat.
    name = watch.removeprefix("eval/").rpartition("/")[2]
    if "loss" in (name, *watch.split("/")[1:2]):
        return False
    return f"eval/{name}" in GENERATION_METRICS or any(
        name in family.better_when_larger for family in FAMILIES.values()
    )


def tasks_to_run(config: RunConfig) -> dict[str, TaskConfig]:
    """All tasks that each evaluation runs, by name: the user's (`evaluation.tasks`), and those that measure forgetting.

    `challenges.forgetting` adds the loss on plain text (`data`), and questions of a chat that come with shardtune: the loss on
    good answers, and two questions whose written answers people read.
    """
    forgetting = config.challenges.forgetting
    tasks = dict(config.evaluation.tasks)
    if forgetting.data is not None and forgetting.action is not Reaction.off:
        tasks[GENERAL_TEXT_TASK] = TaskConfig(kind="loss", path=forgetting.data, max_rows=forgetting.max_rows)
    if _runs_chat_tasks(config):
        questions = TaskConfig(kind="loss", path=str(CHAT_QUESTIONS), format=DataFormat.messages)
        writing = DecodingConfig(max_new_tokens=ANSWER_TOKENS)
        tasks[CHAT_TASK] = questions
        tasks[CHAT_ANSWERS_TASK] = replace(questions, kind="f1", max_rows=ANSWERED_QUESTIONS, write=writing)
    return tasks


def _runs_chat_tasks(config: RunConfig) -> bool:
    """Decide whether evaluations ask the chat questions that come with shardtune, to measure forgetting.

    By `challenges.forgetting.chat`:
    - Forgetting is off, or `chat` is false: no.
    - `chat` is null, the default: if forgetting is measured by something else too, the model learns to chat, and no task of
      the user has the name of one of these.
    - `chat` is true: yes.
    """
    forgetting = config.challenges.forgetting
    if forgetting.action is Reaction.off or forgetting.chat is False:
        return False
    if forgetting.chat is None:
        is_measured = forgetting.data is not None or bool(forgetting.tasks)
        return (
            is_measured
            and _learns_to_chat(config)
            and not {CHAT_TASK, CHAT_ANSWERS_TASK} & config.evaluation.tasks.keys()
        )
    return True


def _learns_to_chat(config: RunConfig) -> bool:
    """Whether the objective trains a model that answers, with the loss of a language model."""
    family = objective_family(config.objective)
    return family.kind is ModelKind.causal and family.generates_answers and build_objective(config.objective).perplexity


def _forgetting_problems(config: RunConfig) -> Iterator[str]:
    """Check the settings that measure what a tuned model forgets of what the base knew (`challenges.forgetting`).

    Yields error messages about its limit, its tasks, its chat questions, and its file of plain text (`data`).
    """
    key = "challenges.forgetting"
    settings = config.challenges.forgetting
    try:
        limit = forgetting_limit(settings)
    except ValueError:
        limit = None
        yield f"{key}.limit={settings.limit}: must be a share of the base's metric, at least 0, as 3% or 0.03"
    if limit is not None and settings.data is None and not settings.tasks and not settings.chat:
        yield f"{key}.limit={settings.limit}: nothing is measured; give {key}.data=general.jsonl, or {key}.tasks=[...]"
    for name in settings.tasks:
        if name not in config.evaluation.tasks:
            known = ", ".join(config.evaluation.tasks) or "none"
            yield f"{key}.tasks=[{name}]: there is no such task in evaluation.tasks, which has {known}"
    if settings.chat:
        yield from _chat_question_problems(config)
    if settings.data is not None:
        yield from _general_text_problems(config, settings.data)


def _general_text_problems(config: RunConfig, path: str) -> Iterator[str]:
    """Check `challenges.forgetting.data`, plain text whose loss shows what a tuned model forgets; yields error messages.

    `path`: its files, which must exist on this machine.
    """
    key = "challenges.forgetting"
    # The file becomes a task of this name, which needs a language model's loss.
    if GENERAL_TEXT_TASK in config.evaluation.tasks:
        yield f"evaluation.tasks.{GENERAL_TEXT_TASK}: is the name of the task that {key}.data makes; call yours otherwise"
    if (
        objective_family(config.objective).kind is ModelKind.classifier
        or not build_objective(config.objective).perplexity
    ):
        yield (
            f"{key}.data={path}: objective={config.objective.name} has no loss on plain text; name tasks with {key}.tasks"
        )
    try:
        expand_paths(path, f"{key}.data", allow_remote=config.data.remote)
    except ShardtuneError as error:
        yield _file_problem(f"{key}.data={path}", error)


def _chat_question_problems(config: RunConfig) -> Iterator[str]:
    """Error messages for `challenges.forgetting.chat=true`, the chat questions that come with shardtune."""
    key = "challenges.forgetting.chat=true"
    if not _learns_to_chat(config):
        yield f"{key}: objective={config.objective.name} trains no model that answers in a chat; leave it out"
    for name in (CHAT_TASK, CHAT_ANSWERS_TASK):
        if name in config.evaluation.tasks:
            yield f"evaluation.tasks.{name}: is the name of a task that {key} makes; call yours otherwise"


def _file_problem(setting_text: str, error: ShardtuneError) -> str:
    """The message of an error about files, with the setting that names them in front: `data.eval_path=x: no such file`."""
    return f"{setting_text}: {str(error).removeprefix(setting_text).lstrip(': ')}"


def _generation_problems(config: RunConfig, *, has_data: bool) -> Iterator[str]:
    """Check `evaluation.generate`, with which an evaluation lets the model answer held-out prompts; yields error messages.

    `has_data`: whether the run has evaluation documents.
    """
    samples = config.evaluation.generate.samples
    watch = config.evaluation.watched
    if watch in GENERATION_METRICS and not samples:
        yield f"evaluation.watch={watch}: needs answers to score; set evaluation.generate.samples=100"
    if samples and not has_data:
        yield (
            f"evaluation.generate.samples={samples}: there is no evaluation data; give data.eval_path or "
            "data.eval_share=0.05, or set it to 0"
        )
    # The model of an objective with rounds generates answers in each round.
    writes_answers = objective_family(config.objective).generates_answers or isinstance(config.objective, RoundsConfig)
    if samples and not writes_answers:
        yield f"evaluation.generate.samples={samples}: objective={config.objective.name} writes no answers; set it to 0"
    yield from config.evaluation.generate.problems("evaluation.generate")


def _task_problems(config: RunConfig) -> Iterator[str]:
    """Check the evaluation tasks (`evaluation.tasks`), their judge and their server; yields error messages.

    A judge is another model that rates answers. Looks for the tasks' files, without reading their rows.
    """
    tasks = config.evaluation.tasks
    family = objective_family(config.objective)
    yield from registry.task_problems(tasks)
    yield from config.evaluation.judge.problems("evaluation.judge")
    yield from _server_problems(config)
    judged = [name for name, task in tasks.items() if _task_needs_judge(name, task)]
    if judged and config.evaluation.judge.url is None:
        yield (
            f"evaluation.tasks.{judged[0]}.kind={tasks[judged[0]].kind}: asks a judge, and there is none; give "
            "evaluation.judge.url=http://host:port/v1 of an OpenAI-compatible server"
        )
    for name, task in tasks.items():
        kind = registry.TASK_KINDS.get(task.kind)
        if kind is None:  # reported by `task_problems`
            continue
        key = f"evaluation.tasks.{name}"
        if family.kind is ModelKind.classifier and not kind.works_with_classifiers:
            yield (
                f"{key}.kind={task.kind}: objective={family.name} trains a head that writes nothing; evaluate its labels with "
                "kind=classification, or leave it out"
            )
        elif task.path is not None and not kind.loads_own_rows:
            try:
                expand_paths(task.path, f"{key}.path", allow_remote=config.data.remote)
            except ShardtuneError as error:
                yield _file_problem(f"{key}.path={task.path}", error)


def _task_needs_judge(name: str, task: TaskConfig) -> bool:
    """Whether a task asks a judge (`evaluation.judge`)."""
    kind = registry.TASK_KINDS.get(task.kind)
    return kind is not None and kind(name, task).needs_judge


def _server_problems(config: RunConfig) -> Iterator[str]:
    """Check what does not go with `evaluation.server`, a model server that answers the tasks in place of a model loaded here.

    Yields error messages; none without a server.
    """
    server = config.evaluation.server
    yield from server.problems("evaluation.server")
    if server.url is None:
        return
    if config.model.adapters:
        yield "evaluation.server: an adapter would be the server's; export the model with it, or name it as the server does"
    if config.strategy.name != "single" or (config.launcher.processes or 1) > 1:
        yield "evaluation.server: nothing is loaded here, so that there is nothing to shard; leave strategy and processes out"
    for name, task in config.evaluation.tasks.items():
        key = f"evaluation.tasks.{name}"
        kind = registry.TASK_KINDS.get(task.kind)
        if kind is not None and not kind.works_with_server:
            yield (
                f"{key}.kind={task.kind}: asks for losses or tokens that no server tells; leave it out, or evaluate without "
                "evaluation.server"
            )
        if task.write.beams > 1:
            yield f"{key}.write.beams={task.write.beams}: servers of this kind search no beams; set it to 1"


def _watched_task_problems(config: RunConfig, *, has_data: bool) -> Iterator[str]:
    """Check that some evaluation measures the watched metric (`evaluation.watch` or its default); yields at most one message.

    - A metric of a task: none.
    - Without held-out data, anything else: only tasks have metrics then.
    - With held-out data, a metric that the named task does not have, such as `eval/facts/blue`.
    """
    tasks = tasks_to_run(config)
    direction_by_metric = registry.metric_directions(tasks)
    watched_metric = config.evaluation.watched
    if watched_metric in direction_by_metric:
        return
    task_metrics = ", ".join(direction_by_metric)
    if not has_data:
        yield (
            f"evaluation.watch={watched_metric}: there is no evaluation data, only tasks; watch one of {task_metrics}, or give "
            "data.eval_path or data.eval_share"
        )
        return
    names = watched_metric.split("/")  # `eval/<task>/<metric>`, or `eval/loss`, which names no task
    names_a_task = len(names) > 2 and names[1] in tasks
    is_loss_of_set = watched_metric.startswith("eval/loss/")  # of a named set of evaluation documents
    if names_a_task and not is_loss_of_set:
        yield f"evaluation.watch={watched_metric}: the tasks yield {task_metrics}; watch one of them"

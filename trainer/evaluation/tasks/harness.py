"""Runs any task of lm-evaluation-harness (Gao et al. 2021) whose data is on this machine, on our engine.

The harness reads the data, makes the requests and scores each row. Intervals and comparisons are ours, over its rows.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import fields, replace
from importlib.util import find_spec
from typing import Any, ClassVar

import numpy as np

from strategies.errors import ConfigError, DataError
from trainer.data.fields import show_value
from trainer.evaluation.base import DecodingConfig, TaskConfig
from trainer.evaluation.harness.task_files import TaskFiles, data_origin, find_tasks
from trainer.evaluation.tasks.base import RatioOfSums, Task, TaskCase, TaskMetric, TaskRow
from trainer.evaluation.tasks.harness_rows import (
    HAS_VALUE_PREFIX,
    LOSS_PREFIX,
    LoadedTasks,
    complete_scores_in_place,
    declared_metrics,
    lm_eval_standard_errors,
    report_rows_of_task,
)
from trainer.evaluation.tasks.model_interface import ModelInterface

APPLIED_WRITE_SETTINGS = ("seed", "batch_tokens")
"""Settings of `write` that apply to tasks of the harness. All others are decided by the task itself."""
MAX_NOTES = 10
"""Most warnings of the harness that a report shows."""


class Harness(Task):
    """A task of lm-evaluation-harness, a group of its tasks, or the user's own YAML, as one task of shardtune."""

    kind = "lm_eval"
    metrics: tuple[TaskMetric, ...] = ()
    rows_description = (
        "a task of lm-evaluation-harness whose data is on this machine; path names your own task: a YAML file, or a "
        "directory with such files"
    )
    options: ClassVar[dict[str, Any]] = {
        "task": None,
        "num_fewshot": None,
        "fewshot_seed": 1234,
        "chat_template": False,
        "system": None,
        "generation": {},
    }
    loads_own_rows = True
    max_resamples = 200  # lm-eval itself takes 100 for its slow metrics
    required_package = "lm_eval"
    pip_extra = "lm_eval"

    def __init__(self, name: str, config: TaskConfig) -> None:
        """Find the harness's task by its name or in the user's YAML, without its data.

        Raises nothing for a task that is not found: `problems` yields it later (`load_problem`), together with all other
        mistakes.
        """
        super().__init__(name, config)
        self.task_files: TaskFiles | None = None
        self.load_problem = ""
        """What is wrong with the name or the YAML; empty if nothing is."""
        self.loaded_tasks: LoadedTasks | None = None
        """The harness's tasks with their data; set by `load_cases`."""
        self.warnings: list[str] = []
        """What the harness and the model's adapter warned of in the last run."""
        # `task_problems` says that the library is missing.
        if find_spec("lm_eval") is None:
            return

        path = None if config.path is None else str(config.path)
        # Without `options.task`, a YAML names its task itself, and otherwise the task of the configuration has the name.
        is_yaml = path is not None and path.endswith((".yaml", ".yml"))
        harness_task = None if is_yaml else name
        if self.option_values["task"]:
            harness_task = str(self.option_values["task"])
        try:
            # Reads YAML files alone.
            self.task_files = find_tasks(harness_task, path)
            self.metrics = declared_metrics(self.task_files)
        except ConfigError as error:
            # The error begins with the value that is wrong.
            is_about_path = path is not None and str(error).startswith(path)
            setting = "path" if is_about_path else "options.task"
            self.load_problem = f"{self.config_key}.{setting}={error}"

    def problems(self) -> Iterator[str]:
        """Yield an error message for each invalid setting of the task, before any row is read.

        Settings of `write` (how answers are generated) are refused, except those in `APPLIED_WRITE_SETTINGS`: the harness's
        task decides how it generates.
        """
        for problem in super().problems():
            # The metrics of a task in Python are not known before it is loaded, so its limits cannot be checked yet.
            if self.metrics or not problem.startswith(f"{self.config_key}.limit."):
                yield problem
        if self.load_problem:
            yield self.load_problem
        decoding = self.decoding
        defaults = DecodingConfig()
        for field in fields(DecodingConfig):
            value = getattr(decoding, field.name)
            if field.name not in APPLIED_WRITE_SETTINGS and value != getattr(defaults, field.name):
                yield (
                    f"{self.config_key}.write.{field.name}={value}: how answers are written is the "
                    f"harness's task's to say; change it by {self.config_key}.options.generation={{max_gen_toks: 64, ...}}"
                )
        if self.config.columns:
            yield (
                f"{self.config_key}.columns: the harness's task names its columns itself (doc_to_text, "
                "doc_to_target); leave it out"
            )
        shots = self.option_values["num_fewshot"]
        if shots is not None and not (isinstance(shots, int) and shots >= 0):
            yield f"{self.config_key}.options.num_fewshot={shots}: must be a number of examples, 0 or more"
        generation = self.option_values["generation"]
        if not isinstance(generation, dict):
            yield f"{self.config_key}.options.generation={generation}: must be settings, as {{max_gen_toks: 64}}"

    @property
    def data_source(self) -> str | None:
        """Where the rows come from, for the report: "hub:allenai/ai2_arc" if all tasks read it, else the path of the YAML.

        None if the tasks are named, not given as a YAML, and read several data sets.
        """
        settings_by_task = {} if self.task_files is None else self.task_files.single_tasks
        data_sets = set()
        for settings in settings_by_task.values():
            is_on_hub = data_origin(settings).hub_data_set is not None
            data_sets.add(str(settings["dataset_path"]) if is_on_hub else None)
        only_data_set = data_sets.pop() if len(data_sets) == 1 else None
        if only_data_set:
            return f"hub:{only_data_set}"
        return None if self.config.path is None else str(self.config.path)

    def load_cases(self) -> list[TaskCase]:
        """Let the harness load its data, and return a case for each row, at most `max_rows` of each of its tasks.

        The harness keeps the rows, so a case has nothing but its location, such as "arc_easy:0". Sets `loaded_tasks`, and
        `metrics` to those of the loaded tasks. Raises ConfigError or DataError if a task cannot be loaded.
        """
        from trainer.evaluation.harness.loading import load_tasks

        assert self.task_files is not None
        try:
            tasks = load_tasks(self.task_files, self.option_values)
        except (ConfigError, DataError) as error:
            # The same kind of error, with the setting that it is about.
            raise type(error)(f"{self.config_key}.kind={self.kind}: {error}") from None
        self.loaded_tasks = LoadedTasks(tasks, mean_weighted_by_rows=self.task_files.mean_weighted_by_rows)
        self.metrics = self.loaded_tasks.metrics
        cases = []
        for name, task in tasks.items():
            num_rows = len(task.eval_docs)
            if self.config.max_rows is not None:
                num_rows = min(num_rows, self.config.max_rows)
            cases += [TaskCase(location=f"{name}:{number}") for number in range(num_rows)]
        return cases

    def prepare_case(self, case: TaskCase) -> None:
        """Nothing to do: the harness has read the row."""

    def score_cases(self, cases: Sequence[TaskCase], model: ModelInterface) -> list[TaskRow]:
        """Let the harness ask our model about all its rows, and turn its results into report rows. All ranks must call.

        `cases` are not read: the harness has its rows itself. Sets `warnings`. Raises DataError if the harness fails; an error
        of our own model or a stop of the run is raised as it is.
        """
        from lm_eval import evaluator

        from trainer.evaluation.harness.isolation import collect_warnings, harness_seeds
        from trainer.evaluation.harness.model import EngineLM

        assert self.loaded_tasks is not None
        # lm-eval's interface of a model, which our engine answers.
        lm = EngineLM(model.answer_generator, model.engine, model.model_config, decoding=self.decoding)
        with collect_warnings() as warnings, harness_seeds():
            # Without this, each evaluation would draw other few-shot examples.
            for task in self.loaded_tasks.tasks.values():
                task.set_fewshot_seed(seed=self.option_values["fewshot_seed"])
            try:
                results: Any = evaluator.evaluate(
                    lm,
                    {"tasks": self.loaded_tasks.tasks, "groups": {}},  # means over a group are ours
                    limit=self.config.max_rows,
                    bootstrap_iters=0,  # intervals are ours
                    system_instruction=self.option_values["system"],
                    apply_chat_template=bool(self.option_values["chat_template"]),
                    fewshot_as_multiturn=True,
                )
            except Exception as error:
                # What our model has raised in a request (an error, or the wish to stop), which the harness passes on.
                if lm.ended_by is not None:
                    raise
                one_line = " ".join(str(error).split())[:300]
                raise DataError(
                    f"{self.name}: lm-eval cannot score its rows ({type(error).__name__}: {one_line})"
                ) from error
        # The model's notes first, such as requests that were cut.
        self.warnings = [*lm.notes(), *warnings][:MAX_NOTES]
        rows = []
        for name in self.loaded_tasks.tasks:
            # `samples`: what lm-eval logged of each document.
            rows += report_rows_of_task(name, results["samples"][name], self.loaded_tasks)
        return complete_scores_in_place(rows, self.loaded_tasks)

    def metrics_for(self, rows: Sequence[TaskRow]) -> tuple[TaskMetric, ...]:
        """The metrics that these rows have values of: a task of the harness may score other things than its YAML says.

        A report row has the value of a metric as a score of that name, or as an item if it is no number, such as a pair of
        labels for F1. A score with a dot in its name is only a part of a metric: `loss.word_perplexity`, or `rows.acc`, which
        is 1 for each row with a value of `acc` if other rows have none.
        """
        row_names = _score_and_item_names(rows)
        known_names = {metric.name for metric in self.metrics}
        metrics = []
        for metric in self.metrics:
            if metric.name in row_names or f"{LOSS_PREFIX}{metric.name}" in row_names:
                metrics.append(metric)
        for name in row_names:  # those that only the rows have come last
            if name not in known_names and "." not in name:
                description = "mean over rows, as lm-eval has it"
                metrics.append(TaskMetric(name, description, greater_is_better=None, ratio_of_sums=RatioOfSums(name)))
        return tuple(_metric_that_fits_rows(metric, rows, row_names) for metric in metrics)

    def weighted_metric_functions(self, rows: Sequence[TaskRow]) -> dict[str, Callable[[np.ndarray], float]]:
        """The metrics that lm-eval computes by functions of its own, such as corpus BLEU, for the bootstrap to call.

        Each takes row weights, float64 [rows]: how often a row counts in a resample.
        """
        assert self.loaded_tasks is not None
        weighted = {}
        for metric in self.metrics_for(rows):
            if metric.ratio_of_sums is None:
                weighted[metric.name] = self.loaded_tasks.weighted_metric(metric.name, rows)
        return weighted

    def compute_metrics(self, rows: Sequence[TaskRow]) -> dict[str, float]:
        """The metrics of all rows, and of several tasks also those of each: {"acc": 0.6, "acc/arc_easy": 0.8, ...}."""
        return self.metrics_by_source(rows)

    def standard_errors(self, rows: Sequence[TaskRow]) -> dict[str, float]:
        assert self.loaded_tasks is not None
        return lm_eval_standard_errors(self.loaded_tasks, self.metrics_for(rows), rows)

    def notes(self, rows: Sequence[TaskRow], intervals: dict[str, tuple[float, float]]) -> Iterator[str]:
        """Sentences for the report: lm-eval's own standard errors, metrics with few resamples, and warnings of the last run.

        `intervals`: not used here.
        """
        errors = []
        for name, error in self.standard_errors(rows).items():
            if "/" not in name:  # those of single tasks are METRIC/TASK
                errors.append(f"{name} {error:.4g}")
        if errors:
            yield f"standard errors as lm-eval computes them: {', '.join(errors)}"
        # A function of lm-eval computes each resample of these from scratch.
        slow_metrics = [*self.weighted_metric_functions(rows)]
        if slow_metrics:
            yield (
                f"intervals of {', '.join(slow_metrics)}: {self.max_resamples} resamples at most, since they are slow to compute"
            )
        yield from self.warnings

    def signatures(self) -> dict[str, str]:
        """What must be equal for two reports to be comparable: versions, and what changes prompts and answers.

        The versions are those of lm-eval and its tasks. The same text for all metrics, {"acc":
        "lm-eval:0.4.13|arc_easy:version 1.0, 5-shot|no chat template"}.
        """
        from importlib.metadata import version

        assert self.loaded_tasks is not None
        parts = [f"lm-eval:{version('lm-eval')}", *self.loaded_tasks.version_notes()]
        parts.append("chat template" if self.option_values["chat_template"] else "no chat template")
        if self.option_values["generation"]:
            parts.append(f"generation:{show_value(self.option_values['generation'])}")
        return self.signature_of_all("|".join(parts))


def _score_and_item_names(rows: Sequence[TaskRow]) -> dict[str, None]:
    """Names of all scores and items of the rows, in the order in which they appear; a dict serves as an ordered set."""
    names: dict[str, None] = {}
    for row in rows:
        names |= dict.fromkeys((*row.scores, *row.items))
    return names


def _metric_that_fits_rows(metric: TaskMetric, rows: Sequence[TaskRow], row_names: Collection[str]) -> TaskMetric:
    """A metric of the harness, changed if it cannot be a ratio of sums over these rows, or not over all of them.

    - Rows have items of it, which are no numbers: no ratio, and the harness's own function computes it from all items.
    - Some rows have no value of it: the mean over the others, which have the score `rows.METRIC`.

    `row_names`: the names of all scores and items of the rows.
    """
    if any(metric.name in row.items for row in rows):
        return replace(metric, ratio_of_sums=None)
    has_value_score = f"{HAS_VALUE_PREFIX}{metric.name}"
    if has_value_score in row_names and metric.ratio_of_sums is not None:
        return replace(metric, ratio_of_sums=RatioOfSums(metric.ratio_of_sums.numerator, has_value_score))
    return metric

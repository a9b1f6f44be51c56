"""`evaluation.html`: an evaluation in one file that needs no network (`page.html.j2`): verdict, all tasks, then rows."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trainer.evaluation.report.intervals import BETTER, DIFFERS, WORSE
from trainer.evaluation.report.page_rows import TaskRows, shortened_line, shown_rows
from trainer.evaluation.report.page_tables import TONE_BY_VERDICT, main_metric, metrics_table, overview_table
from trainer.evaluation.report.record import (
    TUNED,
    EvaluatedModel,
    EvaluationReport,
    TaskComparison,
    TaskRecord,
    model_title,
)
from trainer.evaluation.tasks.base import Task, TaskRow
from trainer.evaluation.tasks.classification import ClassificationTask, ConfusionMatrix, confusion_matrix_of_rows
from trainer.pages.numbers import format_duration, format_number
from trainer.pages.pieces import Callout, PageCard, PageTable, Tone
from trainer.pages.render import render

MAX_MATRIX_LABELS = 40
"""A confusion matrix with more labels is not shown."""


@dataclass(frozen=True, slots=True)
class TaskSection:
    """What the page shows of one task, in a section that is folded at first."""

    name: str
    anchor: str
    headline: str
    """Its main metric in a few words, for the line that opens it."""
    about: str
    metrics: PageTable
    notes: list[str]
    matrix: ConfusionMatrix | None
    """Of a classification with few labels."""
    rows: TaskRows


def render_page(
    report: EvaluationReport,
    tasks: Sequence[Task],
    models: dict[str, EvaluatedModel],
    other_rows: Mapping[str, Sequence[TaskRow]] | None = None,
) -> str:
    """Write the page of an evaluation as HTML: the verdict, all tasks in one table, then each task with its rows.

    Texts of rows are escaped, and cut so that the page stays below 1.5 MB. `report`: the content of `evaluation.json`.
    `models`: the evaluated models, "tuned" and if it was asked too "base". `other_rows`: rows of the model that is compared
    with, by task; tasks whose rows are not known are missing.
    """
    comparisons = _comparison_by_task(report)
    other_label = _other_model_label(report)
    # Of all tasks at once, since the limit on the page's size is one for all of them.
    all_rows = shown_rows(tasks, models[TUNED].rows, other_rows or {}, comparisons)
    sections = []
    for index, task in enumerate(tasks):
        task_record = report["tasks"][task.name]
        comparison = comparisons.get(task.name)
        sections.append(
            TaskSection(
                name=task.name,
                anchor=f"task-{index}",
                headline=_headline(task_record, comparison),
                about=f"{task_record['kind']}, {format_number(task_record['num_rows'])} rows of {_rows_source_text(task_record)}",
                metrics=metrics_table(task_record, comparison, other_label),
                notes=_task_notes(task_record, comparison),
                matrix=_confusion_matrix(task, models[TUNED]),
                rows=all_rows[task.name],
            )
        )
    anchor_by_task = {section.name: section.anchor for section in sections}
    task_records = {task.name: report["tasks"][task.name] for task in tasks}
    # By the template `page.html.j2` of this package; `short` is a filter that it uses.
    return render(
        "trainer.evaluation.report",
        "page.html.j2",
        filters={"short": shortened_line},
        against=report.get("against", {}).get("what", ""),
        regressions=report.get("regressions", []),
        title=model_title(report["model"]),
        verdict=report_verdict_callout(report),
        cards=report_cards(report),
        callouts=report_callouts(report),
        overview=overview_table(task_records, comparisons, anchor_by_task, other_label),
        sections=sections,
        other=other_label,
        facts=_measurement_conditions(report),
    )


def _comparison_by_task(report: EvaluationReport) -> dict[str, TaskComparison]:
    """The comparison with the other model, by task; {} if there is no other model. Tasks that only this model has are missing."""
    comparisons: dict[str, TaskComparison] = report.get("against", {}).get("tasks", {})
    return comparisons


def _confusion_matrix(task: Task, model: EvaluatedModel) -> ConfusionMatrix | None:
    """How often each label was predicted for each true one, in a classification task: (labels, counts[true][predicted]).

    None for other tasks, or with too many labels to show.
    """
    if not isinstance(task, ClassificationTask):
        return None
    matrix = confusion_matrix_of_rows(model.rows[task.name])
    return matrix if len(matrix.label_names) <= MAX_MATRIX_LABELS else None


def _other_model_label(report: EvaluationReport) -> str:
    """What the compared model is called in headings, "base" or "other"; "" if nothing is compared."""
    if "against" not in report:
        return ""
    return "base" if report["against"]["what"] == "base" else "other"


def _rows_source_text(task_record: TaskRecord) -> str:
    """Where the rows of a task come from, in words: its path, or what stands for it."""
    if task_record["path"]:
        return str(task_record["path"])
    return "data that lm-eval makes" if task_record["kind"] == "lm_eval" else "the run's evaluation documents"


def _verdict_by_task(report: EvaluationReport) -> dict[str, str]:
    """The verdict that stands for each compared task, that of its first metric: {"facts": "better"}."""
    verdicts = {}
    for task, comparison in _comparison_by_task(report).items():
        difference = main_metric(report["tasks"][task], comparison).difference
        if difference is not None:
            verdicts[task] = difference["verdict"]
    return verdicts


def report_verdict_callout(report: EvaluationReport) -> Callout:
    """The box at the top of the page: in how many tasks the model is better or worse than the other one.

    - No comparison in the report: a note that says how to make one.
    - The two models have no task in common: a note.
    - A metric became worse than allowed (`regressions`): a bad one. The page lists these metrics below it.
    - Else: the numbers of tasks by verdict, good or bad by what they are.
    """
    if "against" not in report:
        return _nothing_compared_callout(report)
    other = report["against"]["what"]
    counts = VerdictCounts.of(list(_verdict_by_task(report).values()))
    if not counts.total:
        return Callout("note", f"Nothing could be compared with {other}", "The two have no task in common.")
    if report.get("regressions"):
        sentence = ""
        if counts.phrases:
            sentence = f"{', '.join(counts.phrases)} of {_num_tasks_text(counts.total)}. "
            sentence = sentence[:1].upper() + sentence[1:]
        return Callout("bad", f"Worse than {other}", f"{sentence}These metrics became worse:")
    return _verdict_counts_callout(counts, other)


@dataclass(frozen=True, slots=True)
class VerdictCounts:
    """How many compared tasks have which verdict, by the first metric of each."""

    better: int
    worse: int
    different: int
    """Tasks that differ in a metric of which neither direction is better."""
    unclear: int
    """Tasks without a difference that was shown, or with too few cases."""

    @classmethod
    def of(cls, verdicts: Sequence[str]) -> VerdictCounts:
        """The counts of these verdicts, as `evaluation.json` has them."""
        better = verdicts.count(BETTER)
        worse = verdicts.count(WORSE)
        different = verdicts.count(DIFFERS)
        return cls(better, worse, different, unclear=len(verdicts) - better - worse - different)

    @property
    def total(self) -> int:
        """All compared tasks."""
        return self.better + self.worse + self.different + self.unclear

    @property
    def phrases(self) -> list[str]:
        """The counts in words, for the heading: ["better in 2", "no difference shown in 1"]; [] if no task shows a difference."""
        phrases = []
        if self.better:
            phrases.append(f"better in {self.better}")
        if self.worse:
            phrases.append(f"worse in {self.worse}")
        if self.different:
            phrases.append(f"different in {self.different}")
        if self.unclear and phrases:
            phrases.append(f"no difference shown in {self.unclear}")
        return phrases


def _nothing_compared_callout(report: EvaluationReport) -> Callout:
    """The box at the top if nothing was compared: it says how to compare, with the command if the model is of a run."""
    heading = f"{_num_tasks_text(len(report['tasks']))} measured, and compared with nothing"
    run = report["model"]["run"]
    if run:
        text = "Intervals show how far chance reaches. A comparison with the base shows whether tuning made the model better."
        return Callout("note", heading, text, [f"shardtune evaluate {shlex.quote(str(run))} against=base"])
    text = "Intervals show how far chance reaches. Give against=<run or model> to compare this model with another."
    return Callout("note", heading, text, [])


def _verdict_counts_callout(counts: VerdictCounts, other: str) -> Callout:
    """The box at the top of a comparison in which no metric became worse than allowed: the tasks by verdict.

    Its tone is bad if tasks are worse and none is better, a warning if some are worse and some better, good if some are only
    better, else a note. `other`: what the model is compared with.
    """
    heading = f"Against {other}: {', '.join(counts.phrases)} of {_num_tasks_text(counts.total)}"
    if not counts.phrases:
        heading = f"Against {other}: no difference shown in any of {_num_tasks_text(counts.total)}"
    tone: Tone = "note"
    if counts.worse:
        tone = "warning" if counts.better else "bad"
    elif counts.better:
        tone = "good"
    text = "A task counts by its first metric, and as better or worse only if the whole 95 % interval of the difference is."
    return Callout(tone, heading, text)


def _num_tasks_text(count: int) -> str:
    return f"{count} task" if count == 1 else f"{count} tasks"


def report_cards(report: EvaluationReport) -> list[PageCard]:
    """The cards below the verdict box: how many tasks have which verdict, and how many rows were evaluated.

    A card for each verdict in the order of `TONE_BY_VERDICT` ("better", "worse", ...), by the first metric of each task; none
    without a comparison.
    """
    tasks_by_verdict: dict[str, list[str]] = {}
    for task, verdict in _verdict_by_task(report).items():
        tasks_by_verdict.setdefault(verdict, []).append(task)
    cards = []
    for verdict, tone in TONE_BY_VERDICT.items():
        tasks = tasks_by_verdict.get(verdict, [])
        # A verdict without tasks has no card, except "worse": that none became worse is good news.
        if tasks or (verdict == WORSE and tasks_by_verdict):
            cards.append(
                PageCard(
                    label=verdict.capitalize(),
                    value=str(len(tasks)),
                    note=_list_some(tasks),
                    tone=tone if tasks else "",
                )
            )
    num_rows = sum(task["num_rows"] for task in report["tasks"].values())
    seconds = sum(task["seconds"] for task in report["tasks"].values())
    rows_note = f"of {_num_tasks_text(len(report['tasks']))}, in {format_duration(seconds)}"
    cards.append(PageCard(label="Rows evaluated", value=format_number(num_rows), note=rows_note))
    return cards


def _list_some(names: Sequence[str]) -> str:
    """The first four names, and how many more there are: "a, b, c, d and 3 more"."""
    shown = ", ".join(names[:4])
    return f"{shown} and {len(names) - 4} more" if len(names) > 4 else shown


def report_callouts(report: EvaluationReport) -> list[Callout]:
    """The boxes below the verdict, each only if it has something to show.

    - Metrics that became worse, other than the first ones of their tasks, by which the verdict goes.
    - In what the model or its data differs from those of the run (`run.accept`).
    - Tasks that were not compared, because the other model has not run them.
    """
    callouts = []
    worse = []
    for task, comparison in _comparison_by_task(report).items():
        name_of_main_metric = main_metric(report["tasks"][task], comparison).name
        for metric, difference in comparison["metrics"].items():
            # The first metric's verdict is in the box at the top already.
            if metric != name_of_main_metric and difference["verdict"] == WORSE:
                worse.append(f"{task}: {metric}")
    if worse:
        text = f"{_list_some(worse)}. These are no first metrics of their tasks, which the verdict goes by."
        callouts.append(Callout("warning", "Worse in further metrics", text))
    accepted_differences = report["model"].get("accepted") or []
    if accepted_differences:
        callouts.append(
            Callout("warning", "Not quite the model or the data of the run", "; ".join(accepted_differences))
        )
    baseline = report.get("against")
    tasks_missing_in_baseline = baseline["not_there"] if baseline else []
    if baseline and tasks_missing_in_baseline:
        text = f"{', '.join(tasks_missing_in_baseline)}: {baseline['what']} has no such task."
        callouts.append(Callout("note", "Not compared", text))
    return callouts


def _task_notes(task_record: TaskRecord, comparison: TaskComparison | None) -> list[str]:
    """The notes of a task and of its comparison: that few rows differ, or that the other model's rows are others or not known."""
    notes = list(task_record.get("notes", ()))
    if comparison is None:
        return notes
    notes += comparison.get("notes", ())
    if not comparison["paired"]:
        notes.append(
            "The other model answered other rows, or its rows are not known: the numbers are compared, not the rows, and the "
            "interval is this model's own."
        )
    return notes


def _headline(task_record: TaskRecord, comparison: TaskComparison | None) -> str:
    """The main metric of a task in a few words: "exact_match 0.62, was 0.01: better"; without a comparison the value alone."""
    name, metric, difference = main_metric(task_record, comparison)
    headline = f"{name} {format_number(metric['value'])}"
    if difference is None:
        return headline
    return f"{headline}, was {format_number(difference['value'])}: {difference['verdict']}"


def _measurement_conditions(report: EvaluationReport) -> list[tuple[str, str]]:
    """What the numbers depend on, for the end of the page: (name, value) of model, processes, method, versions."""
    model = report["model"]
    facts = [
        ("model", str(model["path"])),
        ("processes", f"{report['processes']}, {report['strategy']}, {report['device']}, {report['precision']}"),
        ("intervals", str(report["method"])),
    ]
    if report.get("server"):
        facts.append(("server", str(report["server"])))
    versions = report.get("versions") or {}
    facts.append(("versions", ", ".join(f"{name} {version}" for name, version in versions.items())))
    return facts

"""`evaluation.html`: an evaluation in one file that needs no network (`page.html.j2`): verdict, all tasks, then rows."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from trainer.evaluation.report.change_scale import Change, ChangeScale
from trainer.evaluation.report.intervals import BETTER, DIFFERS, NO_DIFFERENCE, TOO_FEW_CASES, WORSE
from trainer.evaluation.report.page_rows import TaskRows, shortened_line, shown_rows
from trainer.evaluation.report.record import TUNED, EvaluatedModel
from trainer.evaluation.tasks.base import Task, TaskRow
from trainer.evaluation.tasks.classification import ClassificationTask, confusion_matrix_of_rows
from trainer.pages.numbers import UNKNOWN, format_duration, format_number, format_signed
from trainer.pages.pieces import (
    Callout,
    PageCard,
    PageCell,
    PageColumn,
    PageTable,
    Tone,
)
from trainer.pages.render import render

BARS_CAPTION = (
    "Bars are on one scale: the change in percent of the larger of both values, with its interval. Right of the middle is "
    "better."
)
"""What a table says of its bars."""
MAX_MATRIX_LABELS = 40
"""A confusion matrix with more labels is not shown."""
TONE_BY_VERDICT: dict[str, Tone] = {
    BETTER: "good",
    WORSE: "bad",
    DIFFERS: "note",
    TOO_FEW_CASES: "warning",
    NO_DIFFERENCE: "",
}
"""How a verdict is tinted."""
ReportRecord = dict[str, Any]
"""A part of `evaluation.json`."""


@dataclass(frozen=True, slots=True)
class TaskSection:
    """What the page shows of one task, in a section that is folded at first."""

    name: str
    anchor: str
    headline: str
    """Its leading metric in a few words, for the line that opens it."""
    about: str
    metrics: PageTable
    notes: list[str]
    matrix: tuple[list[str], list[list[int]]] | None
    """(labels, rows by true and predicted label) of a classification with few labels."""
    rows: TaskRows


def render_page(
    report: ReportRecord,
    tasks: Sequence[Task],
    models: dict[str, EvaluatedModel],
    other_rows: Mapping[str, Sequence[TaskRow]] | None = None,
) -> str:
    """The report's page as HTML. Texts of rows are escaped, and cut so that the page stays below 1.5 MB.

    `report`: the content of `evaluation.json`. `models`: the evaluated models by arm, "tuned" or "base". `other_rows`: rows of
    the model that is compared with, by task; tasks whose rows are not known are missing.
    """
    compared_tasks = report.get("against", {}).get("tasks", {})
    all_rows = shown_rows(tasks, models[TUNED].rows, other_rows or {}, compared_tasks)
    sections = []
    for index, task in enumerate(tasks):
        task_record = report["tasks"][task.name]
        compared = compared_tasks.get(task.name)
        sections.append(
            TaskSection(
                name=task.name,
                anchor=f"task-{index}",
                headline=_headline(task_record, compared),
                about=f"{task_record['kind']}, {format_number(task_record['num_rows'])} rows of {_rows_source_text(task_record)}",
                metrics=_metrics_table(task_record, compared, _other_model_label(report)),
                notes=_task_notes(task_record, compared),
                matrix=_confusion_matrix(task, models[TUNED]),
                rows=all_rows[task.name],
            )
        )
    return render(
        "trainer.evaluation.report",
        "page.html.j2",
        filters={"short": shortened_line},
        against=report.get("against", {}).get("what", ""),
        regressions=report.get("regressions", []),
        title=_title(report["model"]),
        verdict=report_verdict(report),
        cards=report_cards(report),
        callouts=report_callouts(report),
        overview=_overview_table(report, sections),
        parts=sections,
        other=_other_model_label(report),
        facts=_condition_facts(report),
    )


def _confusion_matrix(task: Task, model: EvaluatedModel) -> tuple[list[str], list[list[int]]] | None:
    """(labels, counts by true and predicted label) of a classification; None for other tasks, or with too many labels to show."""
    if not isinstance(task, ClassificationTask):
        return None
    labels, counts = confusion_matrix_of_rows(model.rows[task.name])
    return (labels, counts) if len(labels) <= MAX_MATRIX_LABELS else None


def _title(model: ReportRecord) -> str:
    """The evaluated model for the page's title: "runs/a, step-000100 with adapters/b"."""
    title = str(model["run"] or model["path"])
    if model["checkpoint"]:
        title += f", {model['checkpoint']}"
    if model["adapters"]:
        title += f" with {', '.join(model['adapters'])}"
    return title


def _other_model_label(report: ReportRecord) -> str:
    """What the compared model is called in headings, "base" or "other"; "" if nothing is compared."""
    if "against" not in report:
        return ""
    return "base" if report["against"]["what"] == "base" else "other"


def _rows_source_text(task_record: ReportRecord) -> str:
    """Where the rows of a task come from, in words: its path, or what stands for it."""
    if task_record["path"]:
        return str(task_record["path"])
    return "data that lm-eval makes" if task_record["kind"] == "lm_eval" else "the run's evaluation documents"


class MainMetric(NamedTuple):
    """The metric that stands for a task: its first one."""

    name: str
    record: ReportRecord
    difference: ReportRecord | None
    """Its difference from the other model; None if it is not compared."""


def _main_metric(task_record: ReportRecord, compared: ReportRecord | None) -> MainMetric:
    """The metric that stands for a task, its first one. `compared`: the task's record in the comparison; None without one."""
    name, record = next(iter(task_record["metrics"].items()))
    return MainMetric(name, record, None if compared is None else compared["metrics"].get(name))


def _verdict_by_task(report: ReportRecord) -> dict[str, str]:
    """The verdict on the main metric of each compared task, by task: {"facts": "better"}."""
    verdicts = {}
    for task, compared in report.get("against", {}).get("tasks", {}).items():
        leading = _main_metric(report["tasks"][task], compared)
        if leading.difference is not None:
            verdicts[task] = leading.difference["verdict"]
    return verdicts


def report_verdict(report: ReportRecord) -> Callout:
    """The box at the top of the page: in how many tasks the model is better or worse than the other one.

    - No comparison in the report: a note that says how to make one.
    - The two models have no task in common: a note.
    - A metric became worse than allowed (`regressions`): a bad one.
    - Else: the numbers of tasks by verdict (`_counts_callout`).
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
    return _counts_callout(counts, other)


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
        """The counts in words, ["better in 2", "no difference shown in 1"]; [] if no task shows a difference."""
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


def _nothing_compared_callout(report: ReportRecord) -> Callout:
    """The verdict of a report without a comparison: how to compare, with the command if the model is of a run."""
    heading = f"{_num_tasks_text(len(report['tasks']))} measured, and compared with nothing"
    run = report["model"]["run"]
    if run:
        text = "Intervals show how far chance reaches. A comparison with the base shows whether tuning made the model better."
        return Callout("note", heading, text, [f"shardtune evaluate {shlex.quote(str(run))} against=base"])
    text = "Intervals show how far chance reaches. Give against=<run or model> to compare this model with another."
    return Callout("note", heading, text, [])


def _counts_callout(counts: VerdictCounts, other: str) -> Callout:
    """The verdict of a comparison without forbidden losses; `other`: what the model is compared with.

    Bad if tasks are worse and none is better, a warning if some are worse and some better, good if some are only better, else a
    note.
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


def report_cards(report: ReportRecord) -> list[PageCard]:
    """The cards below the verdict box.

    - With a comparison, for each verdict ("better", "worse", ...): how many tasks have it, by the main metric of each.
    - How many rows all tasks asked together.
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


def report_callouts(report: ReportRecord) -> list[Callout]:
    """The boxes below the verdict, each only if it has something to show.

    - Metrics that became worse, other than the first ones of their tasks.
    - In what the model or its data differs from those of the run (`run.accept`).
    - Tasks that were not compared, because the other model has not run them.
    """
    callouts = []
    against = report.get("against")
    worse = []
    for name, compared in (against["tasks"] if against else {}).items():
        leading = _main_metric(report["tasks"][name], compared)
        for metric, difference in compared["metrics"].items():
            if metric != leading.name and difference["verdict"] == WORSE:
                worse.append(f"{name}: {metric}")
    if worse:
        text = f"{_list_some(worse)}. These are no first metrics of their tasks, which the verdict goes by."
        callouts.append(Callout("warning", "Worse in further metrics", text))
    accepted = report["model"].get("accepted") or []
    if accepted:
        callouts.append(Callout("warning", "Not quite the model or the data of the run", "; ".join(accepted)))
    if against and against["not_there"]:
        text = f"{', '.join(against['not_there'])}: {against['what']} has no such task."
        callouts.append(Callout("note", "Not compared", text))
    return callouts


def _overview_table(report: ReportRecord, sections: Sequence[TaskSection]) -> PageTable:
    """The table of all tasks, each by its first metric; with a comparison, also its difference from the other model.

    `report`: the content of `evaluation.json`.
    """
    other = _other_model_label(report)
    compared_tasks = report["against"]["tasks"] if other else {}
    leading_metrics = []
    for section in sections:
        leading_metrics.append(_main_metric(report["tasks"][section.name], compared_tasks.get(section.name)))
    scale = ChangeScale.over(Change.of(leading.record, leading.difference) for leading in leading_metrics)
    # The verdict stands beside the name, where a phone shows it without scrolling.
    columns = [PageColumn("task")]
    if other:
        columns += [PageColumn("verdict"), PageColumn("metric"), PageColumn(other)]
        columns += [PageColumn("tuned" if other == "base" else "this model"), PageColumn("difference")]
        columns.append(PageColumn("95 % interval", scale=scale.labels))
    else:
        columns += [PageColumn("metric"), PageColumn("value"), PageColumn("95 % interval")]
    columns += [PageColumn("better is"), PageColumn("rows")]
    rows = []
    for section, (name, metric, difference) in zip(sections, leading_metrics, strict=True):
        num_rows = report["tasks"][section.name]["num_rows"]
        row = [PageCell(section.name, section.name, href=f"#{section.anchor}")]
        if other:
            row += [_verdict_cell(difference), PageCell(name, name), *_difference_cells(metric, difference, scale)]
        else:
            row += [
                PageCell(name, name),
                PageCell(format_number(metric["value"]), metric["value"]),
                _interval_cell(metric),
            ]
        direction = _better_direction(metric["greater_is_better"])
        rows.append([*row, PageCell(direction, direction), PageCell(format_number(num_rows), num_rows)])
    caption = "Every task by its first metric."
    if other:
        caption += f" {BARS_CAPTION}"
    return PageTable(columns, rows, caption, id="all-tasks")


def _verdict_cell(difference: ReportRecord | None) -> PageCell:
    """The cell with the verdict on a metric; "not compared" if `difference` is None."""
    if difference is None:
        return PageCell("not compared", "not compared")
    return PageCell(difference["verdict"], difference["verdict"], tone=TONE_BY_VERDICT.get(difference["verdict"], ""))


def _difference_cells(metric: ReportRecord, difference: ReportRecord | None, scale: ChangeScale) -> list[PageCell]:
    """Four cells of a compared metric: the other model's value, this model's value, difference, interval of the difference.

    Without a `difference`, only this model's value is known. `scale`: that of the bars in the table.
    """
    value = PageCell(format_number(metric["value"]), metric["value"])
    if difference is None:
        nothing = PageCell(UNKNOWN)
        return [nothing, value, nothing, nothing]
    change = difference["difference"]
    bar = scale.bar(Change.of(metric, difference), TONE_BY_VERDICT.get(difference["verdict"], ""))
    interval = PageCell(
        "", change, note=f"{format_signed(difference['low'])} to {format_signed(difference['high'])}", interval=bar
    )
    other_value = PageCell(format_number(difference["value"]), difference["value"])
    return [other_value, value, PageCell(format_signed(change), change), interval]


def _value_cell(metric: ReportRecord) -> PageCell:
    """The cell with the value of a metric, and its interval below if it has one."""
    interval = _interval_cell(metric).text if metric.get("low") is not None else ""
    return PageCell(format_number(metric["value"]), metric["value"], note=interval)


def _interval_cell(metric: ReportRecord) -> PageCell:
    """The cell with the interval of a value, "0.41 to 0.57". No bar, because values of different metrics share no scale."""
    if metric.get("low") is None:
        return PageCell("\N{EN DASH}")
    return PageCell(f"{format_number(metric['low'])} to {format_number(metric['high'])}", metric["low"])


def _better_direction(greater_is_better: bool | None) -> str:
    """Which values of a metric are better, in a word: "higher", "lower" or "neither"."""
    if greater_is_better is None:
        return "neither"
    return "higher" if greater_is_better else "lower"


def _metrics_table(task_record: ReportRecord, compared: ReportRecord | None, other_label: str) -> PageTable:
    """The table of all metrics of a task, with what each means; with a comparison, also its difference from the other model.

    `task_record`, `compared`: the task's records in `evaluation.json`, of this model and of the comparison (None without one).
    `other_label`: the heading of the other model's column.
    """
    if compared is None:
        rows = [[_metric_cell(name, metric), _value_cell(metric)] for name, metric in task_record["metrics"].items()]
        return PageTable([PageColumn("metric"), PageColumn("value")], rows)
    differences = [compared["metrics"].get(name) for name in task_record["metrics"]]
    metrics = list(task_record["metrics"].items())
    scale = ChangeScale.over(
        Change.of(metric, difference) for (_, metric), difference in zip(metrics, differences, strict=True)
    )
    columns = [PageColumn("metric"), PageColumn("verdict"), PageColumn("value"), PageColumn(other_label)]
    columns += [PageColumn("difference"), PageColumn("its 95 % interval", scale=scale.labels), PageColumn("p")]
    rows = []
    for (name, metric), difference in zip(metrics, differences, strict=True):
        other_value, _, change, interval = _difference_cells(metric, difference, scale)
        p = None if difference is None else difference["p"]
        row = [
            _metric_cell(name, metric),
            _verdict_cell(difference),
            _value_cell(metric),
            other_value,
            change,
            interval,
        ]
        rows.append([*row, PageCell(format_number(p, 2), p)])
    return PageTable(columns, rows, BARS_CAPTION)


def _metric_cell(name: str, metric: ReportRecord) -> PageCell:
    """The cell with the name of a metric; below it what it means, its better direction and its signature."""
    note_parts = [
        metric["says"],
        f"{_better_direction(metric['greater_is_better'])} is better",
        metric.get("signature", ""),
    ]
    return PageCell(name, name, note="; ".join(filter(None, note_parts)))


def _task_notes(task_record: ReportRecord, compared: ReportRecord | None) -> list[str]:
    """The notes of a task, and one more if it was compared with a model whose rows are others or not known."""
    notes = list(task_record.get("notes", ()))
    if compared is not None and not compared["paired"]:
        notes.append(
            "The other model answered other rows, or its rows are not known: the numbers are compared, not the rows, and the "
            "interval is this model's own."
        )
    return notes


def _headline(task_record: ReportRecord, compared: ReportRecord | None) -> str:
    """The leading metric of a task in a few words: "exact_match 0.62, was 0.01: better"; without a comparison the value alone."""
    name, metric, difference = _main_metric(task_record, compared)
    headline = f"{name} {format_number(metric['value'])}"
    if difference is None:
        return headline
    return f"{headline}, was {format_number(difference['value'])}: {difference['verdict']}"


def _condition_facts(report: ReportRecord) -> list[tuple[str, str]]:
    """(name, value) of what the numbers depend on, for the folded section at the end: model, processes, method, versions."""
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

"""`evaluation.html`: an evaluation in one file that needs no network (`page.html.j2`): verdict, all tasks, then rows."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.evaluation.report.change_scale import Change, ChangeScale
from trainer.evaluation.report.intervals import BETTER, DIFFERS, NO_DIFFERENCE, TOO_FEW_CASES, WORSE
from trainer.evaluation.report.page_rows import TaskRows, short, shown_rows
from trainer.evaluation.report.record import TUNED, EvaluatedModel
from trainer.evaluation.tasks.base import Task, TaskRow
from trainer.evaluation.tasks.classification import ClassificationTask, confusion
from trainer.pages.numbers import UNKNOWN, duration, number, signed
from trainer.pages.pieces import (
    Callout,
    PageCard,
    PageCell,
    PageColumn,
    PageTable,
    Tone,
)
from trainer.pages.render import render

BARS = (
    "Bars are on one scale: the change in percent of the larger of both values, with its interval. Right of the middle is "
    "better."
)
"""What a table says of its bars."""
MOST_LABELS = 40
"""A confusion matrix with more labels is not shown."""
TONES: dict[str, Tone] = {BETTER: "good", WORSE: "bad", DIFFERS: "note", TOO_FEW_CASES: "warning", NO_DIFFERENCE: ""}
"""How a verdict is tinted."""
Record = dict[str, Any]
"""A part of `evaluation.json`."""


@dataclass(frozen=True, slots=True)
class TaskPart:
    """What the page shows of one task, folded."""

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
    report: Record,
    tasks: Sequence[Task],
    models: dict[str, EvaluatedModel],
    other_rows: Mapping[str, Sequence[TaskRow]] | None = None,
) -> str:
    """The report's page as HTML. Texts of rows are escaped, and cut so that the page stays below 1.5 MB.

    `models`: the evaluated models by arm (tuned or base). `other_rows`: those of the model that is compared with, by task, as
    far as they are known.
    """
    compared_tasks = report.get("against", {}).get("tasks", {})
    all_rows = shown_rows(tasks, models[TUNED].rows, other_rows or {}, compared_tasks)
    # One part of the page for each task.
    parts = []
    for index, task in enumerate(tasks):
        matrix = None
        if isinstance(task, ClassificationTask):
            matrix = confusion(models[TUNED].rows[task.name])
        if matrix is not None and len(matrix[0]) > MOST_LABELS:  # (label names, counts): too many labels to show
            matrix = None
        task_record = report["tasks"][task.name]
        compared = compared_tasks.get(task.name)
        parts.append(
            TaskPart(
                name=task.name,
                anchor=f"task-{index}",
                headline=_headline(task_record, compared),
                about=f"{task_record['kind']}, {number(task_record['num_rows'])} rows of {_source(task_record)}",
                metrics=_metrics_table(task_record, compared, _other_name(report)),
                notes=_notes(task_record, compared),
                matrix=matrix,
                rows=all_rows[task.name],
            )
        )
    return render(
        "trainer.evaluation.report",
        "page.html.j2",
        filters={"short": short},
        against=report.get("against", {}).get("what", ""),
        regressions=report.get("regressions", []),
        title=_title(report["model"]),
        verdict=report_verdict(report),
        cards=report_cards(report),
        callouts=report_callouts(report),
        overview=_overview(report, parts),
        parts=parts,
        other=_other_name(report),
        facts=_facts(report),
    )


def _title(model: Record) -> str:
    """The evaluated model in words: its run or path, checkpoint and adapters."""
    title = str(model["run"] or model["path"])
    if model["checkpoint"]:
        title += f", {model['checkpoint']}"
    if model["adapters"]:
        title += f" with {', '.join(model['adapters'])}"
    return title


def _other_name(report: Record) -> str:
    """What the compared model is called in headings; empty if nothing is compared."""
    if "against" not in report:
        return ""
    return "base" if report["against"]["what"] == "base" else "other"


def _source(task_record: Record) -> str:
    """Where the rows of a task come from."""
    if task_record["path"]:
        return str(task_record["path"])
    return "data that lm-eval makes" if task_record["kind"] == "lm_eval" else "the run's evaluation documents"


def _leading(task_record: Record, compared: Record | None) -> tuple[str, Record, Record | None]:
    """(name, record, comparison) of the metric that stands for a task: its first one. The comparison is None without one."""
    name, metric = next(iter(task_record["metrics"].items()))
    return name, metric, None if compared is None else compared["metrics"].get(name)


def _verdicts(report: Record) -> dict[str, str]:
    """The verdict on the leading metric of each compared task, by task."""
    verdicts = {}
    for name, compared in report.get("against", {}).get("tasks", {}).items():
        _, _, difference = _leading(report["tasks"][name], compared)
        if difference is not None:
            verdicts[name] = difference["verdict"]
    return verdicts


def report_verdict(report: Record) -> Callout:
    """The box at the top of the page: in how many tasks the model is better or worse than the other one.

    - No comparison in the report: a note that says how to make one.
    - No task in common: a note.
    - Metrics that became worse than allowed ("regressions"): bad.
    - Else the numbers of tasks; bad if some are worse and none better, a warning if both, good if some are only better.
    """
    if "against" not in report:
        run = report["model"]["run"]
        text = "Intervals show how far chance reaches. A comparison with the base shows whether tuning made the model better."
        commands = [f"shardtune evaluate {shlex.quote(str(run))} against=base"] if run else []
        if not run:
            text = (
                "Intervals show how far chance reaches. Give against=<run or model> to compare this model with another."
            )
        return Callout("note", f"{_tasks(len(report['tasks']))} measured, and compared with nothing", text, commands)
    what = report["against"]["what"]
    verdicts = list(_verdicts(report).values())
    num_better = verdicts.count(BETTER)
    num_worse = verdicts.count(WORSE)
    num_different = verdicts.count(DIFFERS)
    unclear = len(verdicts) - num_better - num_worse - num_different
    if not verdicts:
        return Callout("note", f"Nothing could be compared with {what}", "The two have no task in common.")
    # For example ["better in 2", "no difference shown in 1"]; empty if no task shows a difference.
    phrases = [f"better in {num_better}"] if num_better else []
    phrases += [f"worse in {num_worse}"] if num_worse else []
    phrases += [f"different in {num_different}"] if num_different else []  # neither direction of their metric is better
    phrases += [f"no difference shown in {unclear}"] if unclear and phrases else []
    if report.get("regressions"):
        counts = f"{', '.join(phrases)} of {_tasks(len(verdicts))}. " if phrases else ""
        text = f"{counts[:1].upper()}{counts[1:]}These metrics became worse:"
        return Callout("bad", f"Worse than {what}", text)
    heading = f"Against {what}: {', '.join(phrases)} of {_tasks(len(verdicts))}"
    if not phrases:
        heading = f"Against {what}: no difference shown in any of {_tasks(len(verdicts))}"
    text = "A task counts by its first metric, and as better or worse only if the whole 95 % interval of the difference is."
    tone: Tone = "note"
    if num_worse:
        tone = "warning" if num_better else "bad"
    elif num_better:
        tone = "good"
    return Callout(tone, heading, text)


def _tasks(count: int) -> str:
    return f"{count} task" if count == 1 else f"{count} tasks"


def report_cards(report: Record) -> list[PageCard]:
    """How many tasks have which verdict; without a comparison the number of tasks. Then how many rows were asked."""
    names_by_verdict: dict[str, list[str]] = {}
    for name, verdict in _verdicts(report).items():
        names_by_verdict.setdefault(verdict, []).append(name)
    cards = []
    for verdict, tone in TONES.items():
        names = names_by_verdict.get(verdict, [])
        # A verdict without tasks has no card, except "worse": that none became worse is good news.
        if names or (verdict == WORSE and names_by_verdict):
            shown_tone = tone if names else ""
            cards.append(PageCard(verdict.capitalize(), str(len(names)), _some(names), shown_tone))
    num_rows = sum(task["num_rows"] for task in report["tasks"].values())
    seconds = sum(task["seconds"] for task in report["tasks"].values())
    about = f"of {_tasks(len(report['tasks']))}, in {duration(seconds)}"
    cards.append(PageCard("Rows asked", number(num_rows), about))
    return cards


def _some(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    shown = ", ".join(names[:4])
    return f"{shown} and {len(names) - 4} more" if len(names) > 4 else shown


def report_callouts(report: Record) -> list[Callout]:
    """The boxes below the verdict.

    They show further metrics of tasks that became worse, in what the model or its data differs from those of the run (which the
    user has accepted), and tasks that were not compared, as the other model has not run them.
    """
    callouts = []
    against = report.get("against")
    worse = []
    for name, compared in (against["tasks"] if against else {}).items():
        leading, _, _ = _leading(report["tasks"][name], compared)
        for metric, difference in compared["metrics"].items():
            if metric != leading and difference["verdict"] == WORSE:
                worse.append(f"{name}: {metric}")
    if worse:
        text = f"{_some(worse)}. These are no first metrics of their tasks, which the verdict goes by."
        callouts.append(Callout("warning", "Worse in further metrics", text))
    accepted = report["model"].get("accepted") or []
    if accepted:
        callouts.append(Callout("warning", "Not quite the model or the data of the run", "; ".join(accepted)))
    if against and against["not_there"]:
        text = f"{', '.join(against['not_there'])}: {against['what']} has no such task."
        callouts.append(Callout("note", "Not compared", text))
    return callouts


def _overview(report: Record, parts: Sequence[TaskPart]) -> PageTable:
    """The table of all tasks, each by its first metric; with a comparison, also its difference from the other model.

    `report`: the content of `evaluation.json`.
    """
    other = _other_name(report)
    compared_tasks = report["against"]["tasks"] if other else {}
    # (name, record, comparison) of each task's first metric.
    leading = [_leading(report["tasks"][part.name], compared_tasks.get(part.name)) for part in parts]
    scale = ChangeScale.over(Change.of(metric, difference) for _, metric, difference in leading)
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
    for part, (name, metric, difference) in zip(parts, leading, strict=True):
        num_rows = report["tasks"][part.name]["num_rows"]
        row = [PageCell(part.name, part.name, href=f"#{part.anchor}")]
        if other:
            row += [_verdict_cell(difference), PageCell(name, name), *_difference_cells(metric, difference, scale)]
        else:
            row += [PageCell(name, name), PageCell(number(metric["value"]), metric["value"]), _interval_cell(metric)]
        direction = _direction(metric["greater_is_better"])
        rows.append([*row, PageCell(direction, direction), PageCell(number(num_rows), num_rows)])
    caption = "Every task by its first metric."
    if other:
        caption += f" {BARS}"
    return PageTable(columns, rows, caption, id="all-tasks")


def _verdict_cell(difference: Record | None) -> PageCell:
    """The verdict on a compared metric."""
    if difference is None:
        return PageCell("not compared", "not compared")
    return PageCell(difference["verdict"], difference["verdict"], tone=TONES.get(difference["verdict"], ""))


def _difference_cells(metric: Record, difference: Record | None, scale: ChangeScale) -> list[PageCell]:
    """The cells of a comparison: value of the other model, value, difference, interval."""
    value = PageCell(number(metric["value"]), metric["value"])
    if difference is None:
        nothing = PageCell(UNKNOWN)
        return [nothing, value, nothing, nothing]
    change = difference["difference"]
    bar = scale.bar(Change.of(metric, difference), TONES.get(difference["verdict"], ""))
    interval = PageCell("", change, note=f"{signed(difference['low'])} to {signed(difference['high'])}", interval=bar)
    other_value = PageCell(number(difference["value"]), difference["value"])
    return [other_value, value, PageCell(signed(change), change), interval]


def _value_cell(metric: Record) -> PageCell:
    """A value, with its interval below."""
    interval = _interval_cell(metric).text if metric.get("low") is not None else ""
    return PageCell(number(metric["value"]), metric["value"], note=interval)


def _interval_cell(metric: Record) -> PageCell:
    """The interval of a value; without a picture, since values of different metrics share no scale."""
    if metric.get("low") is None:
        return PageCell("\N{EN DASH}")
    return PageCell(f"{number(metric['low'])} to {number(metric['high'])}", metric["low"])


def _direction(greater_is_better: bool | None) -> str:
    """Which way a metric gets better, in a word."""
    if greater_is_better is None:
        return "neither"
    return "higher" if greater_is_better else "lower"


def _metrics_table(task_record: Record, compared: Record | None, other: str) -> PageTable:
    """Every metric of a task, with what it is; with a comparison, also its difference from the other model.

    `task_record`, `compared`: the task's records in `evaluation.json`, of this model and of the comparison. `other`: the name of
    the other model.
    """
    if compared is None:
        rows = [[_metric_cell(name, metric), _value_cell(metric)] for name, metric in task_record["metrics"].items()]
        return PageTable([PageColumn("metric"), PageColumn("value")], rows)
    pairs = [(metric, compared["metrics"].get(name)) for name, metric in task_record["metrics"].items()]
    scale = ChangeScale.over(Change.of(metric, difference) for metric, difference in pairs)
    columns = [PageColumn("metric"), PageColumn("verdict"), PageColumn("value"), PageColumn(other)]
    columns += [PageColumn("difference"), PageColumn("its 95 % interval", scale=scale.labels), PageColumn("p")]
    rows = []
    for name, (metric, difference) in zip(task_record["metrics"], pairs, strict=True):
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
        rows.append([*row, PageCell(number(p, 2), p)])
    return PageTable(columns, rows, BARS)


def _metric_cell(name: str, metric: Record) -> PageCell:
    """The name of a metric, with what it is below."""
    about = [metric["says"], f"{_direction(metric['greater_is_better'])} is better", metric.get("signature", "")]
    return PageCell(name, name, note="; ".join(filter(None, about)))


def _notes(task_record: Record, compared: Record | None) -> list[str]:
    """What a reader must know about the numbers of a task."""
    notes = list(task_record.get("notes", ()))
    if compared is not None and not compared["paired"]:
        notes.append(
            "The other model answered other rows, or its rows are not known: the numbers are compared, not the rows, and the "
            "interval is this model's own."
        )
    return notes


def _headline(task_record: Record, compared: Record | None) -> str:
    """The leading metric of a task in a few words: `exact_match 0.62, base 0.01: better`."""
    name, metric, difference = _leading(task_record, compared)
    headline = f"{name} {number(metric['value'])}"
    if difference is None:
        return headline
    return f"{headline}, was {number(difference['value'])}: {difference['verdict']}"


def _facts(report: Record) -> list[tuple[str, str]]:
    """How the numbers came about, for the folded part at the end."""
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

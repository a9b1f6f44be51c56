"""What `shardtune.compare`, `evaluate` and `plan` return: numbers as pandas tables, and their page for a notebook."""

from __future__ import annotations

import io
import json
import shlex
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.notebook.curve import Curve, draw_picture, running_means
from launch.notebook.fragment import notebook_html
from strategies.errors import ConfigError
from trainer.pages.numbers import UNKNOWN, format_duration, format_number, format_signed
from trainer.pages.pieces import Callout, PageCard, PageCell, PageColumn, PageTable, Tone, worst_first

if TYPE_CHECKING:
    import pandas as pd

    from launch.compare.comparison import ComparedPoint, Comparison

TONE_OF_VERDICT: dict[str, Tone] = {"better": "good", "worse": "bad"}


@dataclass(frozen=True, slots=True)
class ComparisonResult:
    """What `shardtune.compare` returns to a notebook: runs beside each other, as the command `shardtune compare` shows them.

    Each "run" here is a point of the comparison: one combination of settings, trained once or several times (`repeats`).
    """

    comparison: Comparison

    @property
    def verdict(self) -> list[str]:
        """A sentence for each run: its loss, speed and memory beside those of the first."""
        return [run.verdict for run in self.comparison.points]

    @property
    def answer(self) -> list[str]:
        """Whether the runs differ, and which one to take for what, in sentences; empty for a single run."""
        return self.comparison.conclusion.lines

    @property
    def notes(self) -> list[str]:
        """What limits how far the numbers can be compared."""
        return list(self.comparison.notes)

    def runs(self) -> pd.DataFrame:
        """All numbers of the comparison for pandas: a row for each run, with the columns of `compare.csv`."""
        import pandas as pd

        from launch.compare.answer_records import comparison_csv

        # By way of the CSV, so that both have the same columns and types.
        return pd.read_csv(io.StringIO(comparison_csv(self.comparison))).set_index("name")

    def metrics(self) -> pd.DataFrame:
        """The curves of all runs for pandas: a row for each step and each evaluation, with its `run` and `repeat` (from 1 on).

        A row has the metrics that were logged at its step, so metrics of steps are NaN in the row of an evaluation.
        """
        import pandas as pd

        rows = []
        for run in self.comparison.points:  # settings, run once or several times (repeats)
            for repeat, recorded_run in enumerate(run.repeats, 1):
                identity = {"run": run.name, "repeat": repeat}
                rows += [{**identity, **row} for row in recorded_run.steps.values()]
                rows += [{**identity, "step": step, **metrics} for step, metrics in recorded_run.evaluations.items()]
        return pd.DataFrame(rows)

    def __str__(self) -> str:
        from launch.compare.answer import comparison_text

        return comparison_text(self.comparison)

    def _repr_html_(self) -> str:
        """Show the comparison below a notebook cell: the answer, what to take when, a table of the runs, and loss curves."""
        from launch.compare.comparison_page import conclusion_callout, point_callouts, recommendation_cards

        conclusion = self.comparison.conclusion
        # The training loss of each run that has begun, of its first repeat.
        curves = []
        for run in self.comparison.begun_points[:MAX_CURVES]:
            losses = [(step, row["loss"]) for step, row in run.first_repeat.steps.items() if row["loss"] is not None]
            curves.append(Curve(run.name, running_means(losses)))
        return notebook_html(
            f"{len(self.comparison.points)} runs, compared with {self.comparison.default_baseline_name}",
            # There is no conclusion of a single run, or of runs that have not begun: then only their numbers are shown.
            lead=conclusion_callout(conclusion) if conclusion.sentences else None,
            cards=recommendation_cards(conclusion),
            callouts=worst_first(point_callouts(self.comparison.points)),
            lines=_next_command_lines(conclusion.to_learn_more) if conclusion.sentences else self.verdict,
            tables=[_runs_table(self.comparison.points)],
            picture=draw_picture(curves, x_title="steps", description="Training loss of each run over its steps"),
            footer=f"{MAX_CURVES} runs are drawn" if len(self.comparison.begun_points) > MAX_CURVES else "",
        )


MAX_CURVES = 16


def _next_command_lines(to_learn_more: str) -> list[str]:
    """The line below the answer that names the command to run next, if the runs show no difference; else none."""
    return [to_learn_more] if to_learn_more else []


def _runs_table(runs: tuple[ComparedPoint, ...]) -> PageTable:
    """The table of a comparison in a notebook: result and costs of each run, without columns that have no number.

    No cell is marked as the best: the answer names one only if chance does not explain the difference.
    """
    columns = [
        PageColumn("run"),
        PageColumn("state"),
        PageColumn("steps"),
        PageColumn("loss"),
        PageColumn("held-out loss"),
        PageColumn("speed", unit="tokens/s"),
        PageColumn("memory", unit="GiB"),
    ]
    rows = [_run_cells(run) for run in runs]
    is_shown = []  # for each column: run and state always, the others if any run has a number there
    for index in range(len(columns)):
        is_shown.append(index < 2 or any(row[index].text != UNKNOWN for row in rows))
    shown_rows = [list(compress(row, is_shown)) for row in rows]
    return PageTable(list(compress(columns, is_shown)), shown_rows)


def _run_cells(run: ComparedPoint) -> list[PageCell]:
    """The cells of one run, in the order of the columns of `_runs_table`."""
    measured = run.measured
    return [
        _text_cell(run.name),
        _text_cell(run.state),
        _number_cell(measured.steps or None),
        _number_cell(measured.loss, digits=5),
        _number_cell(measured.metrics_at_end.get("eval/loss"), digits=5),
        _number_cell(measured.tokens_per_s),
        _number_cell(measured.memory_gib, digits=3),
    ]


def _text_cell(text: str) -> PageCell:
    """A table cell that is sorted by its text."""
    return PageCell(text, sort_value=text)


def _number_cell(value: float | None, digits: int = 4) -> PageCell:
    """A table cell with a number in so many significant digits, sorted by its full value; a dash for None."""
    return PageCell(format_number(value, digits), sort_value=value)


@dataclass(frozen=True, slots=True)
class EvaluationResult:
    """What `shardtune.evaluate` returns to a notebook: what an evaluation measured, read from its directory."""

    directory: Path
    """It holds evaluation.json, evaluation_rows.jsonl and evaluation.html."""

    @property
    def report(self) -> dict[str, Any]:
        """`evaluation.json`; empty as long as the evaluation has not ended, as when SLURM has only queued it."""
        from trainer.evaluation.report.record import REPORT_FILE

        try:
            content = json.loads((self.directory / REPORT_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    @property
    def page(self) -> Path:
        """The page for a browser."""
        from trainer.evaluation.report.record import PAGE_FILE

        return self.directory / PAGE_FILE

    @property
    def regressions(self) -> list[str]:
        """Metrics that fell against the `evaluation.json` of `against=`, as sentences; empty without one."""
        return list(self.report.get("regressions") or ())

    def metrics(self) -> pd.DataFrame:
        """All metrics of the evaluation for pandas: a row for each metric of each task, with its value and 95 % interval.

        If the evaluation was compared with another model, also that model's value, the difference and a verdict.
        """
        import pandas as pd

        return pd.DataFrame(_metric_rows(self.report))

    def rows(self) -> pd.DataFrame:
        """Every answer for pandas: a row for each question and model, with prompt, answer, reference and scores (`score/<name>`).

        `arm` says which model answered: `tuned`, or `base` for the model before training. Empty if no rows were written.
        """
        import pandas as pd

        from trainer.evaluation.report.record import ROWS_FILE

        try:
            lines = (self.directory / ROWS_FILE).read_text(encoding="utf-8").splitlines()
        except OSError:
            return pd.DataFrame()
        rows = []
        for line in lines:
            row = json.loads(line)
            scores = row.pop("scores", None) or {}
            rows.append(row | {f"score/{name}": score for name, score in scores.items()})
        return pd.DataFrame(rows)

    def __str__(self) -> str:
        from launch.evaluate.answer import report_text

        return report_text(self.report) if self.report else f"{self.directory}: not evaluated yet"

    def _repr_html_(self) -> str:
        """Show the evaluation below a notebook cell: the verdict and the cards of its page, and all metrics in one table."""
        from trainer.evaluation.report.page import report_callouts, report_cards, report_verdict_callout

        report = self.report
        if not report:
            # It has not ended yet: a line says so.
            return notebook_html(str(self))
        callouts = [Callout("bad", "Worse than it may be", line) for line in self.regressions]
        callouts += report_callouts(report)
        for name, task in report["tasks"].items():
            callouts += [Callout("note", name, note) for note in task["notes"]]
        heading = str(report["model"]["run"] or report["model"]["path"])
        if report.get("against"):
            for name, comparison in report["against"]["tasks"].items():
                callouts += [Callout("note", name, note) for note in comparison.get("notes", ())]
            heading += f", against {report['against']['what']}"
        return notebook_html(
            heading,
            lead=report_verdict_callout(report),
            cards=report_cards(report),
            callouts=worst_first(callouts),
            tables=[_metrics_table(_metric_rows(report))],
            footer=f"page: {self.page}",
        )


def _metric_rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Flatten the tasks of `evaluation.json` into a row for each metric: {"task": "qa", "metric": "f1", "value": 0.8, ...}.

    `low` and `high` bound the 95 % interval. After a comparison with another model (`against`), a row also has that model's
    value as `other`, the difference with its interval (difference, difference_low, difference_high), p and verdict. Each is
    None, and the verdict empty, for a metric that the other model lacks.
    """
    against = report.get("against") or {}
    rows = []
    for task_name, task in report.get("tasks", {}).items():
        comparisons = against.get("tasks", {}).get(task_name, {}).get("metrics", {})
        for metric, estimate in task["metrics"].items():
            row = {
                "task": task_name,
                "metric": metric,
                "value": estimate["value"],
                "low": estimate.get("low"),
                "high": estimate.get("high"),
                "rows": task.get("num_rows"),
                "greater_is_better": estimate.get("greater_is_better"),
            }
            if against:
                comparison = comparisons.get(metric, {})
                row |= {
                    "other": comparison.get("value"),
                    "difference": comparison.get("difference"),
                    "difference_low": comparison.get("low"),
                    "difference_high": comparison.get("high"),
                    "p": comparison.get("p"),
                    "verdict": comparison.get("verdict", ""),
                }
            rows.append(row)
    return rows


def _metrics_table(rows: list[dict[str, Any]]) -> PageTable:
    """The table of an evaluation in a notebook: value and interval of each metric, and how it compares with another model.

    `rows`: as `_metric_rows` returns them, such as {"task": "qa", "metric": "accuracy", "value": 0.8, "low": 0.7, ...}.
    """
    is_compared = any("verdict" in row for row in rows)
    titles = ["task", "metric", "value", "95 % interval"]
    if is_compared:  # the verdict comes early: on a narrow screen the last columns are beyond the edge
        titles = ["task", "metric", "verdict", "difference", "value", "95 % interval", "other"]
    table_rows = []
    for row in rows:
        interval = UNKNOWN
        if row["low"] is not None:
            interval = f"{format_number(row['low'])} to {format_number(row['high'])}"
        cell_by_title = {
            "task": _text_cell(row["task"]),
            "metric": _text_cell(row["metric"]),
            "value": _number_cell(row["value"]),
            "95 % interval": _text_cell(interval),
        }
        if is_compared:
            verdict = row["verdict"]
            cell_by_title["verdict"] = PageCell(verdict, verdict, tone=TONE_OF_VERDICT.get(verdict, ""))
            cell_by_title["difference"] = PageCell(format_signed(row["difference"]), sort_value=row["difference"])
            cell_by_title["other"] = _number_cell(row["other"])
        table_rows.append([cell_by_title[title] for title in titles])
    return PageTable([PageColumn(title) for title in titles], table_rows)


@dataclass(frozen=True, slots=True)
class PlanResult:
    """What `shardtune.plan` returns to a notebook: what a run is expected to take on a card, for each option.

    An option is a combination of strategy, checkpointing and micro-batch with which the run could be trained.
    """

    answer: dict[str, Any]
    """As `shardtune plan --json` prints it. Sizes are GiB, times seconds or hours, prices US dollars."""

    @property
    def fits(self) -> bool:
        """Whether any option fits the card."""
        return self.answer["best"] is not None

    @property
    def settings(self) -> list[str]:
        """The settings of the fastest option that fits, for `shardtune.train(*plan.settings)`.

        Raises ConfigError if none fits.
        """
        if not self.fits:
            raise ConfigError("nothing fits: take more cards, a smaller data.max_length or tuning=lora")
        chosen_keys = {override.partition("=")[0] for override in self.answer["best"]}
        # What the user typed, unless the plan chose another value for it.
        typed = [override for override in self.answer["typed"] if override.partition("=")[0] not in chosen_keys]
        return [*typed, *self.answer["best"]]

    def options(self, *, every: bool = False) -> pd.DataFrame:
        """The options for pandas, a row each, the best first; with `every`, also with each micro-batch that was considered."""
        import pandas as pd

        return pd.json_normalize(self.answer["all" if every else "options"], sep="/")

    def left_out(self) -> pd.DataFrame:
        """The options that cannot run, and why."""
        import pandas as pd

        return pd.DataFrame(self.answer["left_out"])

    def __str__(self) -> str:
        model = self.answer["model"]
        job = self.answer["job"]
        cards = f"{job['nodes'] * job['gpus_per_node']} x {self.answer['hardware']['name']}"
        model_on_cards = f"{model['parameters']:,} parameters, {model['trained']:,} trained, on {cards}"
        if not self.fits:
            return f"{model_on_cards}: nothing fits"
        return f"{model_on_cards}: {' '.join(self.answer['best'])}"

    def _repr_html_(self) -> str:
        """Show the plan below a notebook cell: cards of the fastest option that fits, its command, and a table of all options."""
        cards = []
        if self.fits:
            best_option = next(option for option in self.answer["options"] if option["settings"] == self.answer["best"])
            cards = _option_cards(best_option, self.answer)
            lead = Callout("good", "Fastest option that fits", "", [f"shardtune train {shlex.join(self.settings)}"])
        else:
            advice = "Take more cards, a smaller data.max_length, tuning=lora or a larger card."
            lead = Callout("bad", "Nothing fits", advice)
        callouts = [Callout("note", "To know", note) for note in self.answer["notes"]]
        return notebook_html(
            str(self),
            lead=lead,
            cards=cards,
            callouts=callouts,
            tables=[_options_table(self.answer["options"])],
            footer="Expected, not measured: memory of tensors is simulated, speeds are estimated (docs/planning.md).",
        )


def _option_cards(option: dict[str, Any], answer: dict[str, Any]) -> list[PageCard]:
    """The cards above a plan in a notebook: memory, speed, time and price of one option; the last two only if they are known.

    `option`: a combination of strategy, checkpointing and micro-batch, an entry of `options` in `answer`. `answer`: what
    `shardtune plan --json` prints; only the hardware's memory is read.
    """
    gpu_gib = answer["hardware"]["memory_gib"]
    # `margin_gib` is the memory of the card that stays free.
    needed_gib = gpu_gib - option["margin_gib"]
    cards = [
        PageCard("memory", f"{needed_gib:.1f} GiB", f"of {gpu_gib:.1f}; most in {option['peak_at']}"),
        PageCard(
            "speed", f"{format_number(option['tokens_per_s'])} tokens/s", f"{option['step_s']['total']:.2f} s a step"
        ),
    ]
    if option["hours"] is not None:
        cards.append(PageCard("duration", format_duration(option["hours"] * 3600), "the whole budget"))
    if option["price"] is not None:
        cards.append(PageCard("price", f"${option['price']:,.2f}", "all cards"))
    return cards


def _options_table(options: list[dict[str, Any]]) -> PageTable:
    """The table of a plan in a notebook: for each option its settings, the memory left, its speed, and a verdict.

    `options`: as in `shardtune plan --json`. A negative `margin_gib` is what the card lacks; an option that does not fit
    gets no speed.
    """
    columns = [
        PageColumn("strategy"),
        PageColumn("settings"),
        PageColumn("room left", unit="GiB"),
        PageColumn("speed", unit="tokens/s", best="largest"),
        PageColumn("why"),
    ]
    rows = []
    for option in options:
        settings = " ".join(override for override in option["settings"] if not override.startswith("strategy="))
        speed = option["tokens_per_s"] if option["fits"] else None
        rows.append(
            [
                _text_cell(option["strategy"]),
                _text_cell(settings),
                PageCell(f"{option['margin_gib']:+.1f}", sort_value=option["margin_gib"]),
                _number_cell(speed),
                _text_cell(option["why"]),
            ]
        )
    return PageTable(columns, rows)

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
    """Runs beside each other, as `shardtune compare` shows them."""

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
        """One row for each run, with the columns of `compare.csv`: measurements, verdict, and settings that differ."""
        import pandas as pd

        from launch.compare.answer_records import comparison_csv

        return pd.read_csv(io.StringIO(comparison_csv(self.comparison))).set_index("name")

    def metrics(self) -> pd.DataFrame:
        """One row for each step and each evaluation of all runs, as in `Run.metrics()`, with `run` and `repeat`."""
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
        """The comparison as HTML for a notebook: the answer, what to take when, a table of the runs, and their losses."""
        from launch.compare.comparison_page import conclusion_texts, point_callouts, recommendation_cards

        conclusion = self.comparison.conclusion
        tone, heading, text = conclusion_texts(conclusion)
        # The training loss of each run that has begun, of its first repeat.
        curves = []
        for run in self.comparison.begun_points[:MAX_CURVES]:
            losses = [(step, row["loss"]) for step, row in run.first_repeat.steps.items() if row["loss"] is not None]
            curves.append(Curve(run.name, running_means(losses)))
        return notebook_html(
            f"{len(self.comparison.points)} runs, compared with {self.comparison.default_baseline_name}",
            # There is no conclusion of a single run, or of runs that have not begun: then only their numbers are shown.
            lead=Callout(tone, heading, text) if conclusion.sentences else None,
            cards=recommendation_cards(conclusion),
            callouts=worst_first(point_callouts(self.comparison)),
            lines=_next_command_lines(conclusion.to_learn_more) if conclusion.sentences else self.verdict,
            tables=[_runs_table(self.comparison.points)],
            picture=draw_picture(curves, x_title="steps", description="Training loss of each run over its steps"),
            footer=f"{MAX_CURVES} runs are drawn" if len(self.comparison.begun_points) > MAX_CURVES else "",
        )


MAX_CURVES = 16


def _next_command_lines(to_learn_more: str) -> list[str]:
    """The line below the answer that says what to run if it shows no difference; none if there is nothing to run."""
    return [to_learn_more] if to_learn_more else []


def _runs_table(runs: tuple[ComparedPoint, ...]) -> PageTable:
    """The result and the costs of each run, a row for each; columns in which no run has a number are left out.

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
    """The cells of a run in the columns of `_runs_table`."""
    measured = run.measured
    state = run.state
    return [
        PageCell(run.name, run.name),
        PageCell(state, state),
        _number_cell(measured.steps or None),
        _number_cell(measured.loss, digits=5),
        _number_cell(measured.metrics_at_end.get("eval/loss"), digits=5),
        _number_cell(measured.tokens_per_s),
        _number_cell(measured.memory_gib, digits=3),
    ]


def _number_cell(value: float | None, digits: int = 4) -> PageCell:
    """A cell with a number as people write it, with so many significant digits; a dash without one."""
    return PageCell(format_number(value, digits), value)


@dataclass(frozen=True, slots=True)
class EvaluationResult:
    """What an evaluation measured, read from its directory."""

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
        """One row for each metric of each task: its value with a 95 % interval, and how it compares with the other model."""
        import pandas as pd

        return pd.DataFrame(_metric_rows(self.report))

    def rows(self) -> pd.DataFrame:
        """One row for each question and model (`arm` is `tuned` or `base`): prompt, answer, reference and scores."""
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
        """The evaluation as HTML for a notebook: the verdict and the cards of its page, and all metrics in one table."""
        from trainer.evaluation.report.page import report_callouts, report_cards, report_verdict_callout

        report = self.report
        if not report:
            return notebook_html(str(self))
        callouts = [Callout("bad", "Worse than it may be", line) for line in self.regressions]
        callouts += report_callouts(report)
        for name, task in report["tasks"].items():
            callouts += [Callout("note", name, note) for note in task["notes"]]
        heading = str(report["model"]["run"] or report["model"]["path"])
        if report.get("against"):
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
    """A dictionary for each metric of a report, such as {"task": "qa", "metric": "accuracy", "value": 0.8, "low": 0.7, ...}.

    After a comparison it also has the keys other (the value of the other model), difference, difference_low, difference_high
    (its 95 % interval), p and verdict; each is None, and the verdict empty, for a metric that the other model lacks.
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
    """A table of the metrics of all tasks: value and interval, and, after a comparison, the difference and its verdict.

    `rows`: as by `_metric_rows`.
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
            "task": PageCell(row["task"], row["task"]),
            "metric": PageCell(row["metric"], row["metric"]),
            "value": _number_cell(row["value"]),
            "95 % interval": PageCell(interval, interval),
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
    """What a run is expected to take on a card, and the options: combinations of strategy, checkpointing and micro-batch."""

    answer: dict[str, Any]
    """As `shardtune plan --json` prints it. Sizes are GiB, times seconds or hours, prices US dollars."""

    @property
    def fits(self) -> bool:
        """Whether any option fits the card."""
        return self.answer["best"] is not None

    @property
    def settings(self) -> list[str]:
        """The settings of the fastest option that fits, for `shardtune.train(*plan.settings)`. ConfigError if none fits."""
        if not self.fits:
            raise ConfigError("nothing fits: take more cards, a smaller data.max_length or tuning=lora")
        chosen_keys = {override.partition("=")[0] for override in self.answer["best"]}
        typed = [override for override in self.answer["typed"] if override.partition("=")[0] not in chosen_keys]
        return [*typed, *self.answer["best"]]

    def options(self, *, every: bool = False) -> pd.DataFrame:
        """One row for each option, the best first; with `every`, also with each micro-batch that was looked at."""
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
        """The plan as HTML for a notebook: cards of the fastest option that fits, its command to copy, a table of all options."""
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
    """Cards with the memory, the speed, the time and the price of an option; the last two only if they are known.

    `option` and `answer` as in `shardtune plan --json`.
    """
    gpu_gib = answer["hardware"]["memory_gib"]
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
    """The table of the options, as in `shardtune plan --json`: memory left, speed, and how each compares with the best."""
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
                PageCell(option["strategy"], option["strategy"]),
                PageCell(settings, settings),
                PageCell(f"{option['margin_gib']:+.1f}", option["margin_gib"]),
                _number_cell(speed),
                PageCell(option["why"], option["why"]),
            ]
        )
    return PageTable(columns, rows)

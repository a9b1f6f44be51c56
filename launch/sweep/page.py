"""`search.html`: a search in one file that needs no network: the best trial, the metric by each setting, all trials."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from launch.sweep.search_answer import STATES
from launch.sweep.space import SearchedSetting
from launch.sweep.sweeper import Search
from trainer.pages.numbers import number
from trainer.pages.pieces import Callout, PageCard, PageCell, PageColumn, PageTable, Tone
from trainer.pages.render import render

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import FrozenTrial

PAGE_FILE = "search.html"
RUN_PAGE = "report.html"
"""Page of a trial's run in its directory, to which the table links."""
STATE_TONES: dict[str, Tone] = {"done": "good", "pruned": "note", "failed": "bad", "not done": "warning"}
WIDTH, HEIGHT = 320, 170
"""Size of a drawing, in its own units."""
MARGIN = 12
"""Room around the points of a drawing."""
AXIS_LENGTH = 4
"""Length of the metric axis from the best trial on, as a multiple of the distance from the best trial to the median."""


@dataclass(frozen=True, slots=True)
class TrialPoint:
    """A trial in a drawing: its position from the upper left corner, and what the pointer shows."""

    x: float
    y: float
    text: str
    is_best: bool
    is_beyond: bool
    """Whether its metric is beyond the axis."""


@dataclass(frozen=True, slots=True)
class SettingDrawing:
    """The metric of trials by the value of one setting."""

    key: str
    description: str
    """For readers who see no drawing."""
    points: list[TrialPoint]
    ticks: list[str]
    """Values that are named below the drawing: each choice, or both ends of the numbers."""
    has_choices: bool
    upper_metric: str
    """Metric at the upper end of the drawing."""
    lower_metric: str


def search_page(study: Study, search: Search, search_dir: Path) -> str:
    """The page of a search as HTML, with every trial that the study has."""
    trials = study.get_trials(deepcopy=False)
    # Sorting is ascending: with the sign, the best trial comes first.
    sign = -1 if search.greater_is_better else 1
    done = [trial for trial in trials if trial.state.name == "COMPLETE" and trial.value is not None]
    done.sort(key=lambda trial: (sign * (trial.value or 0.0), trial.number))
    # An infinite metric has no position on an axis.
    drawn = [trial for trial in done if math.isfinite(trial.value or 0.0)]
    drawings = [setting_drawing(setting, drawn, search) for setting in search.space] if len(drawn) > 1 else []
    space = [(setting.key, setting.text) for setting in search.space]
    return render(
        "launch.sweep",
        "page.html.j2",
        directory=str(search_dir),
        space=space,
        fixed=shlex.join(search.fixed),
        verdict=_verdict(done, trials, search, search_dir),
        cards=_cards(done, trials, search),
        drawings=drawings,
        metric=search.metric,
        better="higher" if search.greater_is_better else "lower",
        table=_trials_table(done, trials, search, search_dir),
        failures=_failures(trials, search),
        width=WIDTH,
        height=HEIGHT,
    )


def run_directory(trial: FrozenTrial, search_dir: Path) -> Path:
    """The run directory of a trial. A trial with the arguments of an earlier one (its twin) was not run: it has the twin's."""
    return search_dir / str(trial.user_attrs.get("twin", trial.number))


def _verdict(done: Sequence[FrozenTrial], trials: Sequence[FrozenTrial], search: Search, search_dir: Path) -> Callout:
    """The best trial with its arguments and the command that exports its model; or that there is no best trial.

    `done`: the trials with a result, the best first. `trials`: all that were begun.
    """
    num_unfinished = sum(trial.state.name in ("RUNNING", "WAITING") for trial in trials)
    num_unfinished += max(search.settings.trials - len(trials), 0)  # those that were not begun yet
    progress = ""
    if num_unfinished:
        are = "is" if num_unfinished == 1 else "are"
        progress = f"{num_unfinished} of {search.settings.trials} trials {are} not done yet. "
    if not done:
        text = f"{progress}No trial is done, so there is no best one."
        return Callout("warning" if num_unfinished else "bad", "No result", text)
    best = done[0]
    text = f"{progress}The words of the trial, and the command that exports its model:"
    directory = shlex.quote(str(run_directory(best, search_dir)))
    commands = [shlex.join(search.trial_arguments(best.params)), f"shardtune export {directory}"]
    return Callout("good", f"Best: trial {best.number}, {search.metric} {number(best.value)}", text, commands)


def _cards(done: Sequence[FrozenTrial], trials: Sequence[FrozenTrial], search: Search) -> list[PageCard]:
    """The best metric beside the median, and how the trials ended."""
    cards = []
    if done:
        values = sorted(trial.value or 0.0 for trial in done)
        median = f"median {number(values[len(values) // 2])}, of {len(done)}"
        direction = "higher is better" if search.greater_is_better else "lower is better"
        cards.append(PageCard(search.metric, number(done[0].value), f"{median}; {direction}", "good"))
    for state, tone in STATE_TONES.items():
        count = sum(STATES[trial.state.name] == state for trial in trials)
        if count or state == "done":
            cards.append(PageCard(f"Trials {state}", str(count), f"of {search.settings.trials}", tone if count else ""))
    return cards


def _failures(trials: Sequence[FrozenTrial], search: Search) -> list[tuple[str, str]]:
    """(trial with its arguments, reason) of each failed trial."""
    failures = []
    for trial in trials:
        if trial.state.name == "FAIL":
            reason = trial.user_attrs.get("reason", "its command was killed while it was drawn")
            failures.append((f"trial {trial.number}: {' '.join(search.trial_arguments(trial.params))}", reason))
    return failures


def _trials_table(
    done: Sequence[FrozenTrial], trials: Sequence[FrozenTrial], search: Search, search_dir: Path
) -> PageTable:
    """The table of all trials, the best first: number, metric, state, the value of each setting, and what happened.

    `done`: the trials with a result, the best first.
    """
    best: PageColumn = PageColumn(search.metric, best="largest" if search.greater_is_better else "smallest")
    columns = [PageColumn("trial"), best, PageColumn("state")]
    columns += [PageColumn(setting.key, "settings") for setting in search.space]
    columns.append(PageColumn("what happened"))
    rows = []
    done_numbers = {trial.number for trial in done}
    for trial in [*done, *(trial for trial in trials if trial.number not in done_numbers)]:
        state = STATES[trial.state.name]
        page = run_directory(trial, search_dir) / RUN_PAGE
        href = str(page.relative_to(search_dir)) if page.is_file() else ""
        metric = PageCell("\N{EN DASH}")
        if trial.state.name == "COMPLETE":
            metric = PageCell(number(trial.value), trial.value)
        elif trial.intermediate_values:
            # The trial has no result: its last metric is shown, but without a value to sort by it is never the best.
            metric = PageCell(number(trial.intermediate_values[max(trial.intermediate_values)]))
        row = [PageCell(str(trial.number), trial.number, href=href), metric]
        row.append(PageCell(state, state, tone=STATE_TONES[state]))
        for setting in search.space:
            row.append(_setting_cell(setting, trial))
        remark = _what_happened(trial)
        rows.append([*row, PageCell(remark, remark)])
    return PageTable(columns, rows)


def _setting_cell(setting: SearchedSetting, trial: FrozenTrial) -> PageCell:
    """The value of a setting as the trial's command had it."""
    if setting.key not in trial.params:
        return PageCell("\N{EN DASH}")
    value = trial.params[setting.key]
    text = setting.argument(value).partition("=")[2]
    return PageCell(text, text if setting.choices else float(value))


def _what_happened(trial: FrozenTrial) -> str:
    """How a trial ended, if its state and metric do not say it: a twin, pruned or failed; else empty."""
    if "twin" in trial.user_attrs:
        return f"the same words as trial {trial.user_attrs['twin']}, not run again"
    if trial.state.name == "PRUNED" and trial.intermediate_values:
        return f"behind the median at step {max(trial.intermediate_values)}"
    if trial.state.name == "FAIL":
        return str(trial.user_attrs.get("reason", "its command was killed while it was drawn"))
    return ""


def setting_drawing(setting: SearchedSetting, done: Sequence[FrozenTrial], search: Search) -> SettingDrawing:
    """The drawing of the metric by the value of one setting: a point for each of the `done` trials, which are best first."""
    # The axis of the metric goes from the best trial to the worst. Trials that diverged would press all others into one line, so
    # it ends at `AXIS_LENGTH` times the distance to the median, and worse trials are drawn at its end.
    metrics = [trial.value or 0.0 for trial in done]
    best = metrics[0]
    median = metrics[len(metrics) // 2]
    max_length = AXIS_LENGTH * (median - best)
    axis_end = metrics[-1]
    if 0 < abs(max_length) < abs(axis_end - best):
        axis_end = best + max_length
    axis_length = axis_end - best or 1.0

    points = []
    for trial, metric in zip(done, metrics, strict=True):
        value = trial.params[setting.key]
        share = (metric - best) / axis_length  # 0 at the best metric, 1 at the end of the axis
        height = min(share, 1.0) if search.greater_is_better else 1 - min(share, 1.0)
        x = MARGIN + _position(setting, value) * (WIDTH - 2 * MARGIN)
        y = MARGIN + height * (HEIGHT - 2 * MARGIN)
        text = f"trial {trial.number}: {setting.argument(value)}, {search.metric} {number(metric)}"
        points.append(TrialPoint(x, y, text, is_best=trial is done[0], is_beyond=share > 1))
    best_argument = setting.argument(done[0].params[setting.key])
    description = f"{search.metric} of {len(done)} trials by {setting.key}; the best one has {best_argument}"
    ticks = [setting.argument(value).partition("=")[2] for value in setting.choices or (setting.low, setting.high)]
    return SettingDrawing(
        key=setting.key,
        description=description,
        points=points,
        ticks=ticks,
        has_choices=bool(setting.choices),
        upper_metric=number(max(best, axis_end)),
        lower_metric=number(min(best, axis_end)),
    )


def _position(setting: SearchedSetting, value: object) -> float:
    """Position of a value on the axis of its setting, from 0 at the lower end to 1; choices are evenly spread."""
    if setting.choices:
        return (setting.choices.index(str(value)) + 0.5) / len(setting.choices)
    scale = math.log if setting.log else float
    low = scale(setting.low)
    high = scale(setting.high)
    if high <= low:
        return 0.5
    share = (scale(float(value)) - low) / (high - low)  # type: ignore[arg-type]
    return min(max(share, 0.0), 1.0)

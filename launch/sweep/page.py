"""`search.html`: a search in one file that needs no network: the best trial, the metric by each setting, all trials."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from launch.sweep.search_answer import (
    STATE_BY_OPTUNA_STATE,
    completed_trials_best_first,
    failure_reason,
    run_dir_of_trial,
)
from launch.sweep.space import SearchedSetting
from launch.sweep.sweeper import PlannedSearch
from trainer.pages.numbers import format_number
from trainer.pages.pieces import Callout, PageCard, PageCell, PageColumn, PageTable, Tone
from trainer.pages.render import render

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import FrozenTrial

PAGE_FILE = "search.html"
RUN_PAGE_FILE = "report.html"
"""Page of a trial's run in its directory, to which the table links."""
TONE_BY_STATE: dict[str, Tone] = {"done": "good", "pruned": "note", "failed": "bad", "not done": "warning"}
DRAWING_WIDTH, DRAWING_HEIGHT = 320, 170
"""Size of a drawing, in its own units."""
DRAWING_MARGIN = 12
"""Room around the points of a drawing."""
MAX_AXIS_IN_MEDIAN_DISTANCES = 4
"""Length of the metric axis from the best trial on, as a multiple of the distance from the best trial to the median."""


@dataclass(frozen=True, slots=True)
class TrialPoint:
    """A trial in a drawing: its position from the upper left corner, and what the pointer shows."""

    x: float
    y: float
    text: str
    is_best: bool
    is_beyond_axis: bool
    """Whether its metric is beyond the end of the axis, where it is drawn."""


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


def render_search_page(study: Study, search: PlannedSearch, search_dir: Path) -> str:
    """Write the page of a search (search.html): the best trial, counts, the metric by each searched setting, and all trials.

    `study`: Optuna's record of the trials so far. `search_dir`: with a directory for each trial.
    """
    trials = study.get_trials(deepcopy=False)
    completed = completed_trials_best_first(trials, search)
    # An infinite metric has no position on an axis.
    drawable = [trial for trial in completed if math.isfinite(trial.value or 0.0)]
    drawings = []
    if len(drawable) > 1:  # a drawing of one point shows nothing
        drawings = [setting_drawing(setting, drawable, search) for setting in search.searched_settings]
    setting_texts = [(setting.key, setting.values_text) for setting in search.searched_settings]
    return render(
        "launch.sweep",
        "page.html.j2",
        directory=str(search_dir),
        space=setting_texts,
        fixed=shlex.join(search.shared_arguments),
        verdict=_search_verdict(completed, trials, search, search_dir),
        cards=_search_cards(completed, trials, search),
        drawings=drawings,
        metric=search.metric,
        better="higher" if search.greater_is_better else "lower",
        table=_trials_table(completed, trials, search, search_dir),
        failures=_failed_trials_with_reasons(trials, search),
        width=DRAWING_WIDTH,
        height=DRAWING_HEIGHT,
    )


def _search_verdict(
    completed: Sequence[FrozenTrial], trials: Sequence[FrozenTrial], search: PlannedSearch, search_dir: Path
) -> Callout:
    """Tell the reader of a search's page first what came out: the best trial, its arguments, and how to export its model.

    It also says how many trials are not done yet. Without a trial that has a result, it says that there is no best one.
    `completed`: the trials with a result, the best first. `trials`: all that were begun.
    """
    num_unfinished = sum(trial.state.name in ("RUNNING", "WAITING") for trial in trials)
    num_unfinished += max(search.settings.trials - len(trials), 0)  # those that were not begun yet
    progress = ""
    if num_unfinished:
        verb = "is" if num_unfinished == 1 else "are"
        progress = f"{num_unfinished} of {search.settings.trials} trials {verb} not done yet. "
    if not completed:
        text = f"{progress}No trial is done, so there is no best one."
        return Callout("warning" if num_unfinished else "bad", "No result", text)
    best = completed[0]
    text = f"{progress}The settings of the trial, and the command that exports its model:"
    best_run_dir = shlex.quote(str(run_dir_of_trial(best, search_dir)))
    commands = [shlex.join(search.trial_arguments(best.params)), f"shardtune export {best_run_dir}"]
    return Callout("good", f"Best: trial {best.number}, {search.metric} {format_number(best.value)}", text, commands)


def _search_cards(
    completed: Sequence[FrozenTrial], trials: Sequence[FrozenTrial], search: PlannedSearch
) -> list[PageCard]:
    """The boxes at the top of a search's page: the best metric beside the median, then how many trials ended in which way.

    `completed`: the trials with a result, the best first.
    """
    cards = []
    if completed:
        metrics = sorted(trial.value or 0.0 for trial in completed)
        median = f"median {format_number(metrics[len(metrics) // 2])}, of {len(completed)}"
        direction = "higher is better" if search.greater_is_better else "lower is better"
        best_value = format_number(completed[0].value)
        cards.append(PageCard(search.metric, best_value, note=f"{median}; {direction}", tone="good"))
    for state, tone in TONE_BY_STATE.items():
        count = sum(STATE_BY_OPTUNA_STATE[trial.state.name] == state for trial in trials)
        if count or state == "done":  # that none is done is worth a card
            note = f"of {search.settings.trials}"
            cards.append(PageCard(f"Trials {state}", str(count), note=note, tone=tone if count else ""))
    return cards


def _failed_trials_with_reasons(trials: Sequence[FrozenTrial], search: PlannedSearch) -> list[tuple[str, str]]:
    """Why trials failed, for a list on the page: ("trial 3: optim.lr=0.01", "eval/loss is not a number") for each that failed."""
    failures = []
    for trial in trials:
        if trial.state.name == "FAIL":
            title = f"trial {trial.number}: {' '.join(search.trial_arguments(trial.params))}"
            failures.append((title, failure_reason(trial)))
    return failures


def _trials_table(
    completed: Sequence[FrozenTrial], trials: Sequence[FrozenTrial], search: PlannedSearch, search_dir: Path
) -> PageTable:
    """The table of all trials on a search's page, the best first: number, metric, state, each setting's value, and a remark.

    A trial's number links to the page of its run, if that exists.
    `completed`: the trials with a result, the best first. `trials`: all that were begun.
    """
    metric_column = PageColumn(search.metric, best="largest" if search.greater_is_better else "smallest")
    columns = [PageColumn("trial"), metric_column, PageColumn("state")]
    columns += [PageColumn(setting.key, "settings") for setting in search.searched_settings]
    columns.append(PageColumn("what happened"))
    completed_numbers = {trial.number for trial in completed}
    trials_without_result = [trial for trial in trials if trial.number not in completed_numbers]
    rows = []
    for trial in [*completed, *trials_without_result]:
        state = STATE_BY_OPTUNA_STATE[trial.state.name]
        run_page = run_dir_of_trial(trial, search_dir) / RUN_PAGE_FILE
        href = str(run_page.relative_to(search_dir)) if run_page.is_file() else ""
        setting_cells = [_setting_cell(setting, trial) for setting in search.searched_settings]
        remark = _trial_remark(trial)
        rows.append(
            [
                PageCell(str(trial.number), trial.number, href=href),
                _metric_cell(trial),
                PageCell(state, state, tone=TONE_BY_STATE[state]),
                *setting_cells,
                PageCell(remark, remark),
            ]
        )
    return PageTable(columns, rows)


def _metric_cell(trial: FrozenTrial) -> PageCell:
    """The cell that shows how good a trial is, in the table of a search's page. The first case that applies:

    - The trial has a result: that, as the value to sort by.
    - It was evaluated: its last metric, without a value to sort by, so that it is never the best.
    - Otherwise: a dash.
    """
    if trial.state.name == "COMPLETE":
        return PageCell(format_number(trial.value), trial.value)
    if trial.intermediate_values:
        last_step = max(trial.intermediate_values)
        return PageCell(format_number(trial.intermediate_values[last_step]))
    return PageCell("\N{EN DASH}")


def _setting_cell(setting: SearchedSetting, trial: FrozenTrial) -> PageCell:
    """The cell with the value of a setting as the trial's command had it; a dash if the trial was killed before it had one."""
    if setting.key not in trial.params:
        return PageCell("\N{EN DASH}")
    value = trial.params[setting.key]
    text = setting.value_text(value)
    return PageCell(text, text if setting.choices else float(value))


def _trial_remark(trial: FrozenTrial) -> str:
    """What the table of trials says beside state and metric: why a trial failed or was ended early; else empty.

    Also that it was not run, because the sampler drew the arguments of an earlier trial again (a twin).
    """
    if "twin" in trial.user_attrs:
        return f"the same settings as trial {trial.user_attrs['twin']}, not run again"
    if trial.state.name == "PRUNED" and trial.intermediate_values:
        return f"behind the median at step {max(trial.intermediate_values)}"
    if trial.state.name == "FAIL":
        return failure_reason(trial)
    return ""


def setting_drawing(
    setting: SearchedSetting, completed: Sequence[FrozenTrial], search: PlannedSearch
) -> SettingDrawing:
    """Draw which values of a searched setting are good: a point for each trial, at its value and its metric.

    `completed`: the trials with a finite result, the best first. The metric axis begins at the best one.
    """
    metrics = [trial.value or 0.0 for trial in completed]
    best_metric = metrics[0]
    axis_end = _metric_axis_end(metrics)
    # Signed: negative if a greater metric is better. A single value would be divided by 0.
    axis_length = axis_end - best_metric or 1.0
    points = []
    for trial, metric in zip(completed, metrics, strict=True):
        share_from_best = (metric - best_metric) / axis_length  # 0 at the best metric, 1 at the end of the axis
        is_best = trial is completed[0]
        points.append(_trial_point(trial, setting, search, share_from_best=share_from_best, is_best=is_best))
    best_argument = setting.argument(completed[0].params[setting.key])
    return SettingDrawing(
        key=setting.key,
        description=f"{search.metric} of {len(completed)} trials by {setting.key}; the best one has {best_argument}",
        points=points,
        ticks=[setting.value_text(value) for value in setting.choices or (setting.low, setting.high)],
        has_choices=bool(setting.choices),
        upper_metric=format_number(max(best_metric, axis_end)),
        lower_metric=format_number(min(best_metric, axis_end)),
    )


def _trial_point(
    trial: FrozenTrial, setting: SearchedSetting, search: PlannedSearch, *, share_from_best: float, is_best: bool
) -> TrialPoint:
    """Place a trial in the drawing of one setting: the value from left to right, the metric upwards.

    `share_from_best`: where its metric is on the axis, 0 at the best metric of all trials and 1 at the end of the axis; above 1
    it is drawn at the end.
    """
    value = trial.params[setting.key]
    # The larger metrics are above, at small y.
    drawn_share = min(share_from_best, 1.0)
    share_from_top = drawn_share if search.greater_is_better else 1 - drawn_share
    return TrialPoint(
        x=DRAWING_MARGIN + _axis_position(setting, value) * (DRAWING_WIDTH - 2 * DRAWING_MARGIN),
        y=DRAWING_MARGIN + share_from_top * (DRAWING_HEIGHT - 2 * DRAWING_MARGIN),
        text=f"trial {trial.number}: {setting.argument(value)}, {search.metric} {format_number(trial.value or 0.0)}",
        is_best=is_best,
        is_beyond_axis=share_from_best > 1,
    )


def _metric_axis_end(metrics: Sequence[float]) -> float:
    """Where the metric axis of a drawing ends, which begins at the best metric. `metrics`: of the trials, the best first.

    It is the worst metric. But trials that diverged would press all others into one line, so the axis ends at
    `MAX_AXIS_IN_MEDIAN_DISTANCES` times the distance from the best to the median.
    """
    best = metrics[0]
    worst = metrics[-1]
    median = metrics[len(metrics) // 2]
    max_length = MAX_AXIS_IN_MEDIAN_DISTANCES * (median - best)  # signed, as worst - best is
    is_worst_too_far = 0 < abs(max_length) < abs(worst - best)
    return best + max_length if is_worst_too_far else worst


def _axis_position(setting: SearchedSetting, value: object) -> float:
    """Where a value stands on the axis of its setting: 0 at the lower end, 1 at the upper; choices are evenly spread.

    On a logarithmic scale if values are drawn on one.
    """
    if setting.choices:
        return (setting.choices.index(str(value)) + 0.5) / len(setting.choices)
    scale = math.log if setting.is_logarithmic else float
    low = scale(setting.low)
    high = scale(setting.high)
    if high <= low:
        return 0.5
    share = (scale(float(value)) - low) / (high - low)  # type: ignore[arg-type]
    return min(max(share, 0.0), 1.0)

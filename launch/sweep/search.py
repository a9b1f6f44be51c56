"""`shardtune train -m sweeper=optuna`: draws a trial, runs it as `train` runs a job, reports its result, repeats.

The study is a journal in the search's directory; several commands can work on it together. The command that runs a
trial holds a lease for it. If that command is gone, the next one that starts resumes the trial in its directory.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from launch.compare.progress import RunsProgress, run_with_progress
from launch.sweep.sweeper import PlannedSearch, TrialPruning, search_summary_text
from strategies import exit_codes
from strategies.errors import ConfigError, NotRunOwner, ShardtuneError, StorageError
from trainer.reporting.results import read_metric_rows
from trainer.reporting.status import write_text_atomic
from trainer.session.lease import Lease, RunDirInUse
from trainer.stopping.signals import is_signal_pending

if TYPE_CHECKING:
    from optuna.storages import JournalStorage
    from optuna.study import Study
    from optuna.trial import FrozenTrial, Trial

    from launch.config.frozen import ComposedConfig

RunTrial = Callable[[str, "ComposedConfig", Path, RunsProgress], int]
"""Runs a trial to its end. Takes its name, its job, its run directory and the progress to report to; returns its exit code."""
FATAL_EXIT_CODES = (exit_codes.WRONG_DATA, exit_codes.STORAGE_FAILED)
"""Exit codes for data that no run could use and for a full disk: the next trial would end in the same way."""
JOURNAL_FILE = "search.journal"
"""Optuna's record of all trials, in the directory of the search."""
DRAW_LOCK_NAME = "asking"
"""The lock of the command that draws a trial's values, in the same directory."""
SEED_STRIDE = 1_000_003
"""Distance of the samplers' seeds of neighbouring `sweeper.seed`: a prime beyond any number of trials, so that none coincide."""


class SearchProgress(RunsProgress):
    """Shows how far a trial is, reports its evaluations to Optuna as they come, and ends a trial that is to be pruned."""

    def __init__(self, total_trials: int, trial: Trial, run_dir: Path, metric: str, *, prune: bool) -> None:
        """`metric`: of evaluations, by which trials are judged. `prune`: whether a bad trial is ended early."""
        super().__init__(total_trials, 0)
        self.run_number = trial.number
        self.is_pruned = False
        """Whether the trial was asked to end because it is behind the median of the others."""
        self._trial = trial
        self._trial_dir = run_dir
        self._metric = metric
        self._may_prune = prune
        self._reported_file_bytes = -1
        # A resumed trial has reported some steps already.
        self._reported_steps = set(trial.study.get_trials(deepcopy=False)[trial.number].intermediate_values)
        self._was_asked_to_end = False

    def update(self) -> None:
        """Print how far the trial is, and report its new evaluations to Optuna; called many times a second while it runs.

        A trial that is to be pruned, or whose evaluations lack the metric, is asked to save and end, as by `shardtune stop`.
        Sets `is_pruned` if it is to be pruned.
        """
        super().update()
        # Nothing here ends the search: the trial may not have written its metrics yet, and what cannot be written to the journal
        # now is reported again when the trial has ended.
        with suppress(OSError):
            size_bytes = (self._trial_dir / "metrics.jsonl").stat().st_size
            has_new_rows = size_bytes != self._reported_file_bytes
            self._reported_file_bytes = size_bytes
            if has_new_rows:
                self._report_and_end_if_needed()

    def _report_and_end_if_needed(self) -> None:
        """Report the evaluations that are new; ask the trial to end if it is pruned, or if its evaluations lack the metric."""
        self.report_evaluations()
        if self._was_asked_to_end:
            return
        self.is_pruned = self._may_prune and self._trial.should_prune()
        if self.is_pruned or missing_metric_problem(self._trial_dir, self._metric):
            self._was_asked_to_end = True
            os.kill(os.getpid(), signal.SIGTERM)  # this process passes it on to the run, and starts nothing again

    def report_evaluations(self) -> None:
        """Report the trial's evaluations to Optuna, which compares trials at the same step to prune (end early) the bad ones.

        Each is reported once. The evaluation before the first step is the same for all trials, and left out.
        """
        for step, metric_value in metric_by_step(self._trial_dir, self._metric).items():
            is_before_training = step < 1
            if is_before_training or step in self._reported_steps:
                continue
            self._trial.report(metric_value, step)
            self._reported_steps.add(step)  # only now: a report that failed is repeated


def run_trial_to_end(name: str, composed: ComposedConfig, run_dir: Path, progress: RunsProgress) -> int:
    """Run a trial of a search as `train` runs a job, in processes of its own, to its end; returns its exit code.

    `name`: for progress lines. Raises ConfigError where `run_dir` holds another run.
    """
    from launch.config.frozen import is_finished
    from launch.runs.freeze import write_run_config

    write_run_config(composed, run_dir)
    if is_finished(run_dir):  # the command that ran it was killed before it could report the result
        return 0
    return run_with_progress(name, composed, run_dir, progress, verb="train")


def metric_by_step(run_dir: Path, metric: str) -> dict[int, float]:
    """Read how a trial's held-out metric developed, from its `metrics.jsonl`: {0: 4.1, 100: 2.3} by step; {} before there is any.

    Step 0 is the evaluation before training.
    A value that is not finite is NaN.
    """
    value_by_step = {}
    for row in _evaluation_rows(run_dir):
        if metric in row:
            is_finite = isinstance(row[metric], int | float)  # else it is null in the file
            value_by_step[int(row["step"])] = float(row[metric]) if is_finite else math.nan
    return value_by_step


def missing_metric_problem(run_dir: Path, metric: str) -> str | None:
    """Why a trial cannot be judged: the error message if its evaluations lack the metric of the search; None if they have it.

    None also before the first evaluation.
    """
    evaluation_rows = _evaluation_rows(run_dir)
    if not evaluation_rows or any(metric in row for row in evaluation_rows):
        return None
    available = ", ".join(key for key in evaluation_rows[0] if key.startswith("eval/"))
    return f"sweeper.metric={metric}: the evaluations yield {available}; name one of them, and another run.dir"


def _evaluation_rows(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of evaluations in `metrics.jsonl`."""
    evaluation_rows = []
    for row in read_metric_rows(run_dir):
        if any(key.startswith("eval/") for key in row):
            evaluation_rows.append(row)
    return evaluation_rows


def _open_journal(search_dir: Path) -> JournalStorage:
    """Open Optuna's record of a search: the journal in its directory, read from the beginning. Raises OSError."""
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    return JournalStorage(JournalFileBackend(str(search_dir / JOURNAL_FILE)))


def open_study(search: PlannedSearch, search_dir: Path) -> Study:
    """Open Optuna's study, its record of the trials of a search, in the directory of the search; it is created if there is none.

    Raises ConfigError if the directory holds another search or a damaged journal, StorageError if it cannot be written.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    if (search_dir / "config.yaml").exists():
        raise ConfigError(f"run.dir={search_dir}: is the directory of a run; name another one for the search")
    prunes = search.settings.prune is TrialPruning.median
    try:
        search_dir.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of parts that Optuna calls experimental
            study = optuna.create_study(
                study_name="search",
                storage=_open_journal(search_dir),
                direction="maximize" if search.greater_is_better else "minimize",
                pruner=optuna.pruners.MedianPruner() if prunes else optuna.pruners.NopPruner(),
                load_if_exists=True,
            )
    except OSError as error:
        raise StorageError(
            f"run.dir={search_dir}: cannot be written ({error.strerror or error}); name another one"
        ) from error
    except (ValueError, KeyError) as error:  # a line that is no JSON, or of another version
        raise ConfigError(
            f"{search_dir / JOURNAL_FILE}: is damaged ({error}); choose another run.dir, or move it away"
        ) from error
    _record_or_check_identity(study, search.search_identity(), search_dir)
    return study


def _record_or_check_identity(study: Study, identity: dict[str, str], search_dir: Path) -> None:
    """Make sure that a directory's study is of this search, so that commands with other settings do not mix their trials.

    What identifies the search is written into a new study. If a study is of another search, raises ConfigError with every
    difference. `identity`: what must be the same when a search continues, as texts (`PlannedSearch.search_identity`).
    """
    recorded_identity = study.user_attrs.get("asked")
    if recorded_identity is None:  # the study is new
        study.set_user_attr("asked", identity)
        return
    if recorded_identity == identity:
        return
    lines = [f"run.dir={search_dir}: holds another search; choose another run.dir, or undo:"]
    for key in {**recorded_identity, **identity}:
        if recorded_identity.get(key) != identity.get(key):
            lines.append(f"{key}: {recorded_identity.get(key, '-')} there, {identity.get(key, '-')} here")
    raise ConfigError("\n    ".join(lines))


def run_search(search: PlannedSearch, search_dir: Path, run_trial: RunTrial) -> int:
    """Run a search (`train -m sweeper=optuna`): the trials that are left, then the table and the pages; returns the exit code.

    `run_trial` trains one trial. The exit code is, by the first case that applies:

    - A trial was stopped, or ended the whole search: its exit code.
    - Any trial has a result: 0.
    - Otherwise the search has failed, with the exit code of its first failed trial.

    Raises ConfigError, and StorageError if the journal of the search cannot be written.
    """
    from launch.compare.workspace import write_workspace_script_of_runs
    from launch.output import wrap_text
    from launch.sweep.search_answer import search_result_text

    study = open_study(search, search_dir)
    print(search_summary_text(search), file=sys.stderr, flush=True)
    try:
        exit_code = _run_trials(study, search, search_dir, run_trial)
    except OSError as error:  # of the journal: an OSError of a run is printed by the run
        raise StorageError(
            f"run.dir={search_dir}: the search cannot continue ({error}); free space, and repeat the command"
        ) from error
    if exit_code in exit_codes.STOPPED_CODES:
        print("stopped; the same command continues", file=sys.stderr, flush=True)
    trials = study.get_trials(deepcopy=False)
    workspace_line = write_workspace_script_of_runs([search_dir / str(trial.number) for trial in trials], search_dir)
    if workspace_line is not None:  # before the table: its last line is the one to copy
        print("\n".join(wrap_text(workspace_line, 0)), file=sys.stderr, flush=True)
    print(search_result_text(study, search, search_dir), flush=True)
    page = write_search_page(study, search, search_dir)
    if page is not None:
        print(f"written: {page}", file=sys.stderr, flush=True)
    return exit_code or _exit_code_of_results(trials)


def _exit_code_of_results(trials: list[FrozenTrial]) -> int:
    """The exit code of a search that was not stopped: 0 if any trial has a result, else that of the first failed trial.

    0 as well if none has failed. `code` of a trial is the exit code that was recorded when it failed.
    """
    if any(trial.state.name == "COMPLETE" for trial in trials):
        return 0
    exit_codes_of_failures = (trial.user_attrs["code"] for trial in trials if trial.user_attrs.get("code"))
    return next(exit_codes_of_failures, 0)


def write_search_page(study: Study, search: PlannedSearch, search_dir: Path) -> Path | None:
    """Write `search.html`, which shows the trials so far, into the directory of the search; returns its path.

    No error of the page is an error of the search: it is only printed, and the result is None.
    """
    from launch.sweep.page import PAGE_FILE, render_search_page

    page_path = search_dir / PAGE_FILE
    try:
        write_text_atomic(page_path, render_search_page(study, search, search_dir))
    except Exception as error:  # noqa: BLE001 - hours of trials are still to come
        print(f"no {PAGE_FILE}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return None
    return page_path


class _ClaimedTrial(NamedTuple):
    """A trial that this command runs, and the lease that keeps other commands from running it."""

    trial: Trial
    lease: Lease


def _run_trials(study: Study, search: PlannedSearch, search_dir: Path, run_trial: RunTrial) -> int:
    """Run trials one after another until the search has enough: first those that a command left unfinished, then new ones.

    Returns 0, the exit code `PREEMPTED` (75) if this command was asked to stop, or the exit code of a trial that was stopped or
    that ends the whole search.
    """
    # Those that this command has not tried to take over yet: `_take_over_unfinished_trial` removes what it tries.
    unfinished_numbers = [trial.number for trial in study.get_trials(deepcopy=False) if trial.state.name == "RUNNING"]
    while not is_signal_pending():
        claimed = _take_over_unfinished_trial(study, search, search_dir, unfinished_numbers)
        if claimed is None:
            claimed = _start_new_trial(study, search, search_dir)
        if claimed is None:
            return 0
        with claimed.lease:
            try:
                exit_code = _run_trial_and_report(claimed.trial, search, search_dir, run_trial)
            except KeyboardInterrupt:  # between two runs
                exit_code = exit_codes.INTERRUPTED
        write_search_page(study, search, search_dir)  # after each trial, so that the page can be followed
        if exit_code in (*exit_codes.STOPPED_CODES, *FATAL_EXIT_CODES):
            return exit_code
    return exit_codes.PREEMPTED


def _take_over_unfinished_trial(
    study: Study, search: PlannedSearch, search_dir: Path, unfinished_numbers: list[int]
) -> _ClaimedTrial | None:
    """Claim a trial whose command has ended before it, to resume it: the first one that no other command runs; None if none.

    Each number that was tried is removed from `unfinished_numbers`. A trial whose command was killed before all of its values
    were drawn is reported as failed.
    """
    while unfinished_numbers:
        number = unfinished_numbers.pop(0)
        lease = _acquire_trial_lease(search, search_dir, number)
        if lease is None:
            continue
        recorded_trial = study.get_trials(deepcopy=False)[number]
        is_unfinished = recorded_trial.state.name == "RUNNING"  # another command may have finished it meanwhile
        # Optuna records the value of one setting after the other, and a command may be killed in between.
        has_all_values = len(recorded_trial.params) == len(search.searched_settings)
        if is_unfinished and has_all_values:
            return _ClaimedTrial(_trial_to_continue(study, search_dir, number), lease)  # resumed in its directory
        if is_unfinished:
            study.tell(number, state=_optuna_trial_state("FAIL"))
        lease.release()
    return None


def _trial_to_continue(study: Study, search_dir: Path, number: int) -> Trial:
    """Optuna's trial `number`, to report to it again. Optuna has no call for that: this is how it makes one from its records."""
    from optuna.trial import Trial

    storage = _open_journal(search_dir)
    study_id = storage.get_study_id_from_name(study.study_name)
    trial_id = storage.get_trial_id_from_study_id_trial_number(study_id, number)
    return Trial(study, trial_id)


def _start_new_trial(study: Study, search: PlannedSearch, search_dir: Path) -> _ClaimedTrial | None:
    """Begin a new trial: Optuna draws its values, and this command claims it; None if the search has enough trials.

    A lock lets one command draw at a time, because all commands that work on the search share the number of trials. If another
    command claims the new trial first, as one that it finds unfinished, a further one is drawn.
    """
    from optuna.samplers import TPESampler
    from optuna.storages.journal import JournalFileSymlinkLock

    draw_lock = JournalFileSymlinkLock(str(search_dir / DRAW_LOCK_NAME))
    while True:
        draw_lock.acquire()
        try:
            number = len(study.get_trials(deepcopy=False))
            if number >= search.settings.trials:
                return None
            # The seed depends on the trial's number, so that a command that continues draws what the first would have drawn.
            sampler_seed = (search.settings.seed * SEED_STRIDE + number) % 2**32
            study.sampler = TPESampler(seed=sampler_seed)
            trial = study.ask({setting.key: setting.distribution() for setting in search.searched_settings})
        finally:
            draw_lock.release()
        lease = _acquire_trial_lease(search, search_dir, trial.number)
        if lease is not None:
            return _ClaimedTrial(trial, lease)


def _acquire_trial_lease(search: PlannedSearch, search_dir: Path, number: int) -> Lease | None:
    """Claim trial `number` for this command, so that no other one runs it; None if another command holds it.

    The claim is a lease with heartbeats. If its holder was killed, this host sees that at once; for a holder on another host,
    this waits up to `run.lease_s` seconds for a heartbeat.
    """
    lease_dir = search_dir / "commands" / str(number)
    try:
        return Lease.acquire(lease_dir, search.first_trial.config.run.lease_s, stop=is_signal_pending)
    except RunDirInUse:
        return None


def _run_trial_and_report(trial: Trial, search: PlannedSearch, search_dir: Path, run_trial: RunTrial) -> int:
    """Run one trial and report its result to the study; returns the exit code of its run. The cases, in order:

    - An earlier trial had the same arguments: its result counts for both, and nothing is run (0).
    - Another user started the run: it is left to them (0).
    - The evaluations lack the metric, as they would in every trial: ConfigError.
    - The trial was pruned (0), or stopped: a stopped trial stays unfinished, so that a later command resumes it.
    - Otherwise it is done or has failed: see `_report_result`.
    """
    from launch.compare.run_files import read_recorded_run
    from launch.config.axes import point_label, set_point_name_in_trackers
    from launch.config.compose import compose_config

    study = trial.study
    arguments = search.trial_arguments(trial.params)
    # Rounded values and choices may be drawn twice.
    completed_twin = _completed_trial_with_arguments(study, arguments, search)
    if completed_twin is not None:
        trial.set_user_attr("twin", completed_twin.number)
        study.tell(trial.number, completed_twin.value)
        return 0

    run_dir = search_dir / str(trial.number)
    prunes = search.settings.prune is TrialPruning.median
    progress = SearchProgress(search.settings.trials, trial, run_dir, search.metric, prune=prunes)
    name = point_label(dict(argument.split("=", 1) for argument in arguments))  # type: ignore[arg-type]
    reason = None
    try:
        composed = compose_config([*search.shared_arguments, *arguments])
        set_point_name_in_trackers(composed.config.logging, search_dir, name, arguments)
        exit_code = run_trial(name, composed, run_dir, progress)
        if exit_code and exit_code not in exit_codes.STOPPED_CODES:
            reason = read_recorded_run(run_dir).reason
    except NotRunOwner as error:  # started by somebody else: theirs to end
        print(f"trial {trial.number} is left: {error}", file=sys.stderr, flush=True)
        return 0
    except ShardtuneError as error:
        exit_code = error.exit_code
        reason = str(error)
        print(f"{run_dir}: {reason}", file=sys.stderr, flush=True)

    metric_problem = missing_metric_problem(run_dir, search.metric)
    if metric_problem:
        raise ConfigError(metric_problem)
    progress.report_evaluations()
    was_stopped = exit_code in exit_codes.STOPPED_CODES
    if was_stopped and progress.is_pruned:
        study.tell(trial.number, state=_optuna_trial_state("PRUNED"))
        print(f"trial {trial.number}: pruned, it is behind the median of the others", file=sys.stderr, flush=True)
        return 0
    if was_stopped:
        return exit_code
    return _report_result(trial, search, run_dir, exit_code, reason)


def _report_result(trial: Trial, search: PlannedSearch, run_dir: Path, exit_code: int, reason: str | None) -> int:
    """Report the result of a trial to Optuna's study, or that it failed; returns the trial's exit code.

    The trial was neither stopped by the user nor pruned (ended early as a bad one).
    The trial's result is the metric of its last evaluation. Without a finite one the trial has failed, with the exit code
    70. `exit_code` is the one of its run, and `reason` says why the run failed, if it did.
    """
    metric_values = list(metric_by_step(run_dir, search.metric).values())
    last_value = metric_values[-1] if metric_values else math.nan
    if exit_code == 0 and not math.isfinite(last_value):
        exit_code = exit_codes.FAILED
        reason = f"{search.metric} is not a number" if metric_values else "it was never evaluated"
    if exit_code != 0:
        trial.set_user_attr("code", exit_code)
        reason_line = " ".join(str(reason or f"ended with {exit_code}").split())
        trial.set_user_attr("reason", reason_line)
        trial.study.tell(trial.number, state=_optuna_trial_state("FAIL"))
        return exit_code
    trial.study.tell(trial.number, last_value)
    print(f"trial {trial.number}: {search.metric} {last_value:.6g}", file=sys.stderr, flush=True)
    return 0


def _completed_trial_with_arguments(study: Study, arguments: list[str], search: PlannedSearch) -> FrozenTrial | None:
    """Find a completed trial with the same arguments (a twin), so that its result can be taken over; None without one."""
    for earlier_trial in study.get_trials(deepcopy=False):
        if earlier_trial.state.name == "COMPLETE" and search.trial_arguments(earlier_trial.params) == arguments:
            return earlier_trial
    return None


def _optuna_trial_state(name: str) -> Any:
    from optuna.trial import TrialState

    return TrialState[name]

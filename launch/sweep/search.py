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
from typing import TYPE_CHECKING, Any

from launch.compare.progress import RunsProgress, run_with_progress
from launch.sweep.sweeper import Prune, Search, listing
from strategies.errors import ConfigError, NotOurs, ShardtuneError, StorageError
from trainer.reporting.results import rows
from trainer.session.lease import InUse, Lease
from trainer.stopping.signals import pending

if TYPE_CHECKING:
    from optuna.storages import JournalStorage
    from optuna.study import Study
    from optuna.trial import FrozenTrial, Trial

    from launch.config.frozen import Composed

RunTrial = Callable[[str, "Composed", Path, RunsProgress], int]
STOPPED_CODES = (75, 130)
"""Exit codes of a run that was asked to stop: it can be resumed."""
HOPELESS_CODES = (65, 74)
"""Exit codes for data that no run could use and for a full disk: the next trial would end in the same way."""
JOURNAL = "search.journal"


class SearchProgress(RunsProgress):
    """Tells the search of a trial's evaluations as they come, and ends it if it is behind."""

    def __init__(self, of: int, trial: Trial, directory: Path, metric: str, *, prune: bool) -> None:
        super().__init__(of, 0)
        self.run_number = trial.number
        self.pruned = False
        self._trial = trial
        self._directory = directory
        self._metric = metric
        self._prune = prune
        self._metrics_size = -1
        # A trial that is resumed has reported some steps before.
        self._reported_steps = set(trial.study.get_trials(deepcopy=False)[trial.number].intermediate_values)
        self._asked_to_end = False

    def update(self) -> None:
        """Read the metrics if there are more of them; ask a run that is behind or has no metric to end, as `stop` does."""
        super().update()
        file = self._directory / "metrics.jsonl"
        with suppress(OSError):
            size = file.stat().st_size
            if size == self._metrics_size:
                return
            self._metrics_size = size
            self.report()
            if self._asked_to_end:
                return
            self.pruned = self._prune and self._trial.should_prune()
            if self.pruned or missing_metric(self._directory, self._metric):
                self._asked_to_end = True
                os.kill(os.getpid(), signal.SIGTERM)  # this process passes it on to the run, and starts nothing again

    def report(self) -> None:
        """Tell of evaluations behind the first step, each once."""
        for step, metric in evaluations(self._directory, self._metric).items():
            if step < 1 or step in self._reported_steps:
                continue
            self._reported_steps.add(step)
            self._trial.report(metric, step)


def start_trial(name: str, composed: Composed, run_dir: Path, progress: RunsProgress) -> int:
    """Run a trial in processes of its own to the end; the exit code. Raises ConfigError where the directory is another's."""
    from launch.config.frozen import is_finished
    from launch.runs.freeze import freeze

    freeze(composed, run_dir)
    if is_finished(run_dir):  # its command was killed before it could tell
        return 0
    return run_with_progress(name, composed, run_dir, progress, verb="train")


def evaluations(run_dir: Path, metric: str) -> dict[int, float]:
    """The values of a metric by step; 0 is before the first. Empty if there are none yet."""
    metric_by_step = {}
    for row in _rows(run_dir):
        if metric in row:
            # A value that is not finite is null in the file.
            is_number = isinstance(row[metric], int | float)
            metric_by_step[int(row["step"])] = float(row[metric]) if is_number else math.nan
    return metric_by_step


def missing_metric(run_dir: Path, metric: str) -> str | None:
    """Why no trial can be judged by the metric: evaluations do not have it. None if one has, or if there was none yet."""
    evaluated = _rows(run_dir)
    if not evaluated or any(metric in row for row in evaluated):
        return None
    available = ", ".join(key for key in evaluated[0] if key.startswith("eval/"))
    return f"sweeper.metric={metric}: the evaluations yield {available}; name one of them, and another run.dir"


def _rows(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl that evaluations wrote."""
    evaluated = []
    for row in rows(run_dir):
        if any(key.startswith("eval/") for key in row):
            evaluated.append(row)
    return evaluated


def _storage(base: Path) -> JournalStorage:
    """The journal of the search in the directory `base`, read from its beginning. Raises OSError."""
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    return JournalStorage(JournalFileBackend(str(base / JOURNAL)))


def open_study(search: Search, base: Path) -> Study:
    """The study of the directory, created if there is none. Raises ConfigError if it is of another search, StorageError."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    if (base / "config.yaml").exists():
        raise ConfigError(f"run.dir={base}: is the directory of a run; name another one for the search")
    prunes = search.settings.prune is Prune.median
    try:
        base.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            study = optuna.create_study(
                study_name="search",
                storage=_storage(base),
                direction="maximize" if search.greater_is_better else "minimize",
                pruner=optuna.pruners.MedianPruner() if prunes else optuna.pruners.NopPruner(),
                load_if_exists=True,
            )
    except OSError as error:
        raise StorageError(
            f"run.dir={base}: cannot be written ({error.strerror or error}); name another one"
        ) from error
    except (ValueError, KeyError) as error:  # a line that is no JSON, or of another version
        raise ConfigError(f"{base / JOURNAL}: is damaged ({error}); choose another run.dir, or move it away") from error
    _refuse_another_search(study, search.identity(), base)
    return study


def _refuse_another_search(study: Study, identity: dict[str, str], base: Path) -> None:
    """Raise ConfigError if the study is of another search; note the identity of this one in a new study."""
    recorded = study.user_attrs.get("asked")
    if recorded is None:
        study.set_user_attr("asked", identity)
        return
    if recorded == identity:
        return
    lines = [f"run.dir={base}: holds another search; choose another run.dir, or undo:"]
    for key in {**recorded, **identity}:
        if recorded.get(key) != identity.get(key):
            lines.append(f"{key}: {recorded.get(key, '-')} there, {identity.get(key, '-')} here")
    raise ConfigError("\n    ".join(lines))


def run_search(search: Search, base: Path, run: RunTrial) -> int:
    """Run what is left of the trials by `run`, and show them; the exit code. Raises ConfigError, StorageError."""
    from launch.sweep.search_answer import table

    study = open_study(search, base)
    print(listing(search), file=sys.stderr, flush=True)
    try:
        code = _run_trials(study, search, base, run)
    except OSError as error:  # of the journal: those of runs are told by them
        raise StorageError(
            f"run.dir={base}: the search cannot continue ({error}); free space, and repeat the command"
        ) from error
    if code in STOPPED_CODES:
        print("stopped; the same command continues", file=sys.stderr, flush=True)
    print(table(study, search, base), flush=True)
    trials = study.get_trials(deepcopy=False)
    if code or any(trial.state.name == "COMPLETE" for trial in trials):
        return code
    # Without a single result the search failed, with the code of its first failure.
    return next((trial.user_attrs["code"] for trial in trials if trial.user_attrs.get("code")), 0)


def _run_trials(study: Study, search: Search, base: Path, run: RunTrial) -> int:
    """Run trials until there are enough; 75 if this command was asked to stop, or the code of a trial that ends all."""
    unfinished = [trial.number for trial in study.get_trials(deepcopy=False) if trial.state.name == "RUNNING"]
    while not pending():
        claimed = _take_over(study, search, base, unfinished)
        if claimed is None:
            claimed = _new_trial(study, search, base)
        if claimed is None:
            return 0
        trial, lease = claimed
        with lease:
            try:
                code = _run_trial(trial, search, base, run)
            except KeyboardInterrupt:  # between two runs
                code = 130
        if code in (*STOPPED_CODES, *HOPELESS_CODES):
            return code
    return 75


def _take_over(study: Study, search: Search, base: Path, unfinished: list[int]) -> tuple[Trial, Lease] | None:
    """A trial that was running when this command began, and that no other command runs any more."""
    from optuna.trial import Trial

    while unfinished:
        number = unfinished.pop(0)
        lease = _claim_trial(search, base, number)
        if lease is None:
            continue
        trial = study.get_trials(deepcopy=False)[number]
        if trial.state.name == "RUNNING" and len(trial.params) == len(search.space):
            storage = _storage(base)
            study_id = storage.get_study_id_from_name(study.study_name)
            trial_id = storage.get_trial_id_from_study_id_trial_number(study_id, number)
            return Trial(study, trial_id), lease  # its run is resumed in its directory
        if trial.state.name == "RUNNING":  # killed while it was drawn
            study.tell(number, state=_trial_state("FAIL"))
        lease.release()
    return None


def _new_trial(study: Study, search: Search, base: Path) -> tuple[Trial, Lease] | None:
    """A new trial; None if there are enough. One command at a time: the number of trials is that of all together."""
    from optuna.samplers import TPESampler
    from optuna.storages.journal import JournalFileSymlinkLock

    lock = JournalFileSymlinkLock(str(base / "asking"))
    while True:
        lock.acquire()
        try:
            number = len(study.get_trials(deepcopy=False))
            if number >= search.settings.trials:
                return None
            # Of the trial's number: a command that goes on draws what the first one would have drawn.
            study.sampler = TPESampler(seed=(search.settings.seed * 1_000_003 + number) % 2**32)
            trial = study.ask({setting.key: setting.distribution() for setting in search.space})
        finally:
            lock.release()
        lease = _claim_trial(search, base, trial.number)
        if lease is not None:
            return trial, lease


def _claim_trial(search: Search, base: Path, number: int) -> Lease | None:
    """The lease that allows this command to run a trial; None if another command has it."""
    try:
        return Lease.acquire(base / "commands" / str(number), search.first_job.config.run.lease_s, stop=pending)
    except InUse:
        return None


def _run_trial(trial: Trial, search: Search, base: Path, run: RunTrial) -> int:
    """Run one trial and tell the study; the exit code of its run. One that was asked to stop stays as it is.

    Raises ConfigError if its evaluations have no such metric: those of the other trials would not have it either.
    """
    from launch.compare.run_files import read_recorded_run
    from launch.config.axes import label, name_in_trackers
    from launch.config.compose import compose

    study = trial.study
    words = search.words_of(trial.params)
    same_trial = _same_trial(study, trial, words, search)
    # Rounded values and choices may be drawn twice: the first result counts for both.
    if same_trial is not None:
        trial.set_user_attr("twin", same_trial.number)
        study.tell(trial.number, same_trial.value)
        return 0
    run_dir = base / str(trial.number)
    prunes = search.settings.prune is Prune.median
    progress = SearchProgress(search.settings.trials, trial, run_dir, search.metric, prune=prunes)
    name = label(dict(word.split("=", 1) for word in words))  # type: ignore[arg-type]
    reason = None
    try:
        composed = compose([*search.fixed, *words])
        name_in_trackers(composed.config.logging, base, name, words)
        code = run(name, composed, run_dir, progress)
        if code and code not in STOPPED_CODES:
            reason = read_recorded_run(run_dir).reason
    except NotOurs as error:  # started by somebody else: theirs to end
        print(f"trial {trial.number} is left: {error}", file=sys.stderr, flush=True)
        return 0
    except ShardtuneError as error:
        code = error.exit_code
        reason = str(error)
        print(f"{run_dir}: {reason}", file=sys.stderr, flush=True)
    refusal = missing_metric(run_dir, search.metric)
    if refusal:
        raise ConfigError(refusal)
    progress.report()
    if code in STOPPED_CODES and progress.pruned:
        study.tell(trial.number, state=_trial_state("PRUNED"))
        print(f"trial {trial.number}: pruned, it is behind the median of the others", file=sys.stderr, flush=True)
        return 0
    if code in STOPPED_CODES:
        return code
    return _tell_result(trial, search, run_dir, code, reason)


def _tell_result(trial: Trial, search: Search, run_dir: Path, code: int, reason: str | None) -> int:
    """Tell the study of a trial that ended by itself with `code`; a result that is no number counts as failed."""
    metrics = list(evaluations(run_dir, search.metric).values())
    last_metric = metrics[-1] if metrics else math.nan
    if not code and not math.isfinite(last_metric):
        code = 70
        reason = f"{search.metric} is not a number" if metrics else "it was never evaluated"
    if code:
        trial.set_user_attr("code", code)
        trial.set_user_attr("reason", " ".join(str(reason or f"ended with {code}").split()))
        trial.study.tell(trial.number, state=_trial_state("FAIL"))
        return code
    trial.study.tell(trial.number, last_metric)
    print(f"trial {trial.number}: {search.metric} {last_metric:.6g}", file=sys.stderr, flush=True)
    return 0


def _same_trial(study: Study, trial: Trial, words: list[str], search: Search) -> FrozenTrial | None:
    """A trial that is done and had the same words: this one would end likewise."""
    for earlier in study.get_trials(deepcopy=False):
        if earlier.state.name == "COMPLETE" and search.words_of(earlier.params) == words:
            return earlier
    return None


def _trial_state(name: str) -> Any:
    from optuna.trial import TrialState

    return TrialState[name]

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

Run = Callable[[str, "Composed", Path, RunsProgress], int]
STOPPED = (75, 130)
"""Exit codes of a run that was asked to stop: it is gone on with."""
USELESS = (65, 74)
"""Of data that no run could use, and of a disk that is full: so would the next trial end."""
JOURNAL = "search.journal"


class SearchProgress(RunsProgress):
    """Tells the search of a trial's evaluations as they come, and ends it where it is behind."""

    def __init__(self, of: int, trial: Trial, directory: Path, metric: str, *, prune: bool) -> None:
        super().__init__(of, 0)
        self._trial, self._directory, self._metric, self._prune = trial, directory, metric, prune
        self._size = -1
        self._told_of = set(trial.study.get_trials(deepcopy=False)[trial.number].intermediate_values)
        self.number = trial.number
        self.pruned = self._ended = False

    def update(self) -> None:
        """Read the metrics where there are more of them; ask a run that is behind or has no metric to end, as `stop` does."""
        super().update()
        file = self._directory / "metrics.jsonl"
        with suppress(OSError):
            size = file.stat().st_size
            if size != self._size:
                self._size = size
                self.report()
                if self._ended:
                    return
                self.pruned = self._prune and self._trial.should_prune()
                if self.pruned or lacking(self._directory, self._metric):
                    self._ended = True
                    os.kill(os.getpid(), signal.SIGTERM)  # ours, who pass it on and start nothing again

    def report(self) -> None:
        """Tell of evaluations behind the first step, each once."""
        for step, value in evaluations(self._directory, self._metric).items():
            if step < 1 or step in self._told_of:
                continue
            self._told_of.add(step)
            self._trial.report(value, step)


def start(name: str, composed: Composed, run_dir: Path, progress: RunsProgress) -> int:
    """Run a trial in processes of its own to the end; the exit code. Raises ConfigError where the directory is another's."""
    from launch.config.frozen import is_finished
    from launch.runs.freeze import freeze

    freeze(composed, run_dir)
    if is_finished(run_dir):  # its command was killed before it could tell
        return 0
    return run_with_progress(name, composed, run_dir, progress, verb="train")


def evaluations(run_dir: Path, metric: str) -> dict[int, float]:
    """The values of a metric by step; 0 is before the first. Empty where there are none yet."""
    return {
        int(row["step"]): float(row[metric]) if isinstance(row[metric], int | float) else math.nan
        for row in _rows(run_dir)
        if metric in row
    }


def lacking(run_dir: Path, metric: str) -> str | None:
    """Why no trial can be judged by the metric, after an evaluation that does not have it; None where one has, or was none."""
    evaluated = _rows(run_dir)
    if not evaluated or any(metric in row for row in evaluated):
        return None
    there = ", ".join(key for key in evaluated[0] if key.startswith("eval/"))
    return f"sweeper.metric={metric}: the evaluations yield {there}; name one of them, and another run.dir"


def _rows(run_dir: Path) -> list[dict[str, Any]]:
    """Those of evaluations that can be read."""
    return [row for row in rows(run_dir) if any(key.startswith("eval/") for key in row)]


def _storage(base: Path) -> JournalStorage:
    """The journal of the search in the directory `base`, read from its beginning. Raises OSError."""
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    return JournalStorage(JournalFileBackend(str(base / JOURNAL)))


def open_study(search: Search, base: Path) -> Study:
    """The study of the directory, made where there is none. Raises ConfigError where it is of another search, StorageError."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    if (base / "config.yaml").exists():
        raise ConfigError(f"run.dir={base}: is the directory of a run; name another one for the search")
    try:
        base.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            study = optuna.create_study(
                study_name="search",
                storage=_storage(base),
                direction="maximize" if search.greater_is_better else "minimize",
                pruner=optuna.pruners.MedianPruner()
                if search.settings.prune is Prune.median
                else optuna.pruners.NopPruner(),
                load_if_exists=True,
            )
    except OSError as error:
        raise StorageError(
            f"run.dir={base}: cannot be written ({error.strerror or error}); name another one"
        ) from error
    except (ValueError, KeyError) as error:  # a line that is no JSON, or of another version
        raise ConfigError(f"{base / JOURNAL}: is damaged ({error}); choose another run.dir, or move it away") from error
    asked, before = search.asked(), study.user_attrs.get("asked")
    if before is None:
        study.set_user_attr("asked", asked)
    elif before != asked:
        changed = [
            f"{key}: {before.get(key, '-')} there, {asked.get(key, '-')} here"
            for key in {**before, **asked}
            if before.get(key) != asked.get(key)
        ]
        refusal = f"run.dir={base}: holds another search; choose another run.dir, or undo:"
        raise ConfigError("\n    ".join([refusal, *changed]))
    return study


def run_search(search: Search, base: Path, run: Run) -> int:
    """Run what is left of the trials by `run`, and show them; the exit code. Raises ConfigError, StorageError."""
    from launch.sweep.search_answer import table

    study = open_study(search, base)
    print(listing(search), file=sys.stderr, flush=True)
    try:
        code = _work(study, search, base, run)
    except OSError as error:  # of the journal: those of runs are told by them
        raise StorageError(
            f"run.dir={base}: the search cannot continue ({error}); free space, and repeat the command"
        ) from error
    if code in STOPPED:
        print("stopped; the same command continues", file=sys.stderr, flush=True)
    print(table(study, search, base), flush=True)
    trials = study.get_trials(deepcopy=False)
    if code or any(trial.state.name == "COMPLETE" for trial in trials):
        return code
    return next((trial.user_attrs["code"] for trial in trials if trial.user_attrs.get("code")), 0)


def _work(study: Study, search: Search, base: Path, run: Run) -> int:
    left = [trial.number for trial in study.get_trials(deepcopy=False) if trial.state.name == "RUNNING"]
    while not pending():
        held = _take_over(study, search, base, left) or _ask(study, search, base)
        if held is None:
            return 0
        trial, lease = held
        with lease:
            try:
                code = _one(trial, search, base, run)
            except KeyboardInterrupt:  # between two runs
                code = 130
        if code in (*STOPPED, *USELESS):
            return code
    return 75


def _take_over(study: Study, search: Search, base: Path, left: list[int]) -> tuple[Trial, Lease] | None:
    """A trial that was running when this command began, and of which nobody takes care any more."""
    from optuna.trial import Trial

    while left:
        number = left.pop(0)
        lease = _claim(search, base, number)
        if lease is None:
            continue
        there = study.get_trials(deepcopy=False)[number]
        if there.state.name == "RUNNING" and len(there.params) == len(search.space):
            storage = _storage(base)
            study_id = storage.get_study_id_from_name(study.study_name)
            trial_id = storage.get_trial_id_from_study_id_trial_number(study_id, number)
            return Trial(study, trial_id), lease
        if there.state.name == "RUNNING":  # killed while it was drawn
            study.tell(number, state=_state("FAIL"))
        lease.release()
    return None


def _ask(study: Study, search: Search, base: Path) -> tuple[Trial, Lease] | None:
    """A new trial; None where there are enough. One command at a time: the number of trials is that of all together."""
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
            trial = study.ask({one.key: one.distribution() for one in search.space})
        finally:
            lock.release()
        lease = _claim(search, base, trial.number)
        if lease is not None:
            return trial, lease


def _claim(search: Search, base: Path, number: int) -> Lease | None:
    """The right to run a trial; None where another command has it."""
    try:
        return Lease.acquire(base / "commands" / str(number), search.first.config.run.lease_s, stop=pending)
    except InUse:
        return None


def _one(trial: Trial, search: Search, base: Path, run: Run) -> int:
    """Run one trial and tell the study; the exit code of its run. One that was asked to stop stays as it is.

    Raises ConfigError where its evaluations have no such metric: nor would those of the others.
    """
    from launch.compare.run_files import read_point
    from launch.config.axes import label, name_in_trackers
    from launch.config.compose import compose

    study, words = trial.study, search.words_of(trial.params)
    if (twin := _twin(study, trial, words, search)) is not None:
        trial.set_user_attr("twin", twin.number)
        study.tell(trial.number, twin.value)
        return 0
    run_dir = base / str(trial.number)
    progress = SearchProgress(
        search.settings.trials, trial, run_dir, search.metric, prune=search.settings.prune is Prune.median
    )
    name = label(dict(word.split("=", 1) for word in words))  # type: ignore[arg-type]
    try:
        composed = compose([*search.fixed, *words])
        name_in_trackers(composed.config.logging, base, name, words)
        code = run(name, composed, run_dir, progress)
        reason = read_point(run_dir).reason if code and code not in STOPPED else None
    except NotOurs as error:  # started by somebody else: theirs to end
        print(f"trial {trial.number} is left: {error}", file=sys.stderr, flush=True)
        return 0
    except ShardtuneError as error:
        code, reason = error.exit_code, str(error)
        print(f"{run_dir}: {reason}", file=sys.stderr, flush=True)
    if lacks := lacking(run_dir, search.metric):
        raise ConfigError(lacks)
    progress.report()
    values = evaluations(run_dir, search.metric)
    if code in STOPPED and progress.pruned:
        study.tell(trial.number, state=_state("PRUNED"))
        print(f"trial {trial.number}: pruned, it is behind the median of the others", file=sys.stderr, flush=True)
        return 0
    if code in STOPPED:
        return code
    value = list(values.values())[-1] if values else None
    if not code and (value is None or not math.isfinite(value)):
        code, reason = 70, f"{search.metric} is not a number" if values else "it was never evaluated"
    if code:
        trial.set_user_attr("code", code)
        trial.set_user_attr("reason", " ".join(str(reason or f"ended with {code}").split()))
        study.tell(trial.number, state=_state("FAIL"))
        return code
    study.tell(trial.number, value)
    print(f"trial {trial.number}: {search.metric} {value:.6g}", file=sys.stderr, flush=True)
    return 0


def _twin(study: Study, trial: Trial, words: list[str], search: Search) -> FrozenTrial | None:
    """A trial that is done and had the same words: so would this one end."""
    done = [each for each in study.get_trials(deepcopy=False) if each.state.name == "COMPLETE"]
    return next((each for each in done if search.words_of(each.params) == words), None)


def _state(name: str) -> Any:
    from optuna.trial import TrialState

    return TrialState[name]

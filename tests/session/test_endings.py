"""How a run ended, as trackers are told: what broke it off decides, and its findings after that."""

from types import SimpleNamespace

import pytest

from strategies.base import Progress
from strategies.errors import Diverged, LimitExceeded, Preempted, StorageError
from trainer.config.run import RunConfig
from trainer.monitors.config import ChallengesConfig
from trainer.monitors.detectors import ChallengeDetectors
from trainer.monitors.kept_answers import KeptAnswer, KeptAnswers
from trainer.reporting.outcome import TrainingOutcome
from trainer.reporting.run_record import RunRecord
from trainer.session.announcements import recording_end_of_training

DIVERGED = {
    "divergence": {"found": True, "verdict": "diverged", "step": 20, "says": "diverged: worse than at its start"}
}


@pytest.mark.parametrize(
    ("error", "challenges", "state"),
    [
        (None, {}, "done"),
        (None, DIVERGED, "diverged"),
        (LimitExceeded("challenges.divergence.action=stop"), DIVERGED, "diverged"),
        (Diverged("loss is not finite"), {}, "diverged"),
        (StorageError("no space left"), DIVERGED, "failed"),
        (Preempted("asked to stop"), DIVERGED, "preempted"),
    ],
)
def test_trackers_are_told_what_ended_a_run(tmp_path, error, challenges, state):
    endings = []
    trackers = SimpleNamespace(summarise=lambda values: None, close=endings.append, hints=[])
    console = SimpleNamespace(end_progress_bar=lambda: None, print_line=print)
    context = SimpleNamespace(run_dir=tmp_path, console=console, runtime=SimpleNamespace(is_main=False))
    meter = SimpleNamespace(median_speeds=dict, peaks={})
    checkpoints = SimpleNamespace(wait_at_most=lambda seconds: None)
    record = RunRecord(objective="sft")
    outcome = TrainingOutcome(Progress(step=30), findings_by_detector=challenges)
    try:
        with recording_end_of_training(RunConfig(), trackers, outcome, record, meter, checkpoints, context):
            if error is not None:
                raise error
    except type(error or ValueError()) as caught:
        assert caught is error
    assert [ending.tracked_state for ending in endings] == [state]


def test_detectors_write_into_a_directory_that_was_renamed(tmp_path):
    (tmp_path / "new").mkdir()
    challenges = ChallengeDetectors(ChallengesConfig(), 1, "loss", events_file=tmp_path / "old" / "events.jsonl")
    challenges.kept_answers = KeptAnswers(tmp_path / "old")
    challenges.follow_renamed_run_dir(tmp_path / "new")
    challenges.add_answers("facts", [KeptAnswer("Who?", "I", "you")])
    challenges.kept_answers.write_pending_answers(10)
    assert challenges.events_file == tmp_path / "new" / "events.jsonl"
    assert (tmp_path / "new" / "answers.json").is_file() and not (tmp_path / "old").exists()

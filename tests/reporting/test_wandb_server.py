"""What the real client sends to a server, as a stand-in keeps it: rows, names, columns, how a run ended, and a message."""

import pytest
import wandb

from tests.helpers.wandb_server import wandb_server
from tests.reporting.test_tracking import tracked
from trainer.reporting.config import Alert, LoggingConfig, WandbMode
from trainer.reporting.status import RunState
from trainer.reporting.trackers.base import RunEnding
from trainer.reporting.tracking import open_trackers_without_rows

ENDINGS = {
    "done": RunEnding(RunState.done),
    "preempted": RunEnding(RunState.preempted, 75, "asked to stop"),
    "diverged": RunEnding(RunState.failed, 69, "loss is not finite", diverged=True),
}
LABELS = {"displayName": "look at this", "notes": "too high a rate?", "tags": ["small", "to discuss"]}
"""What somebody has made of the run `diverged` in the app while it trained."""


@pytest.fixture(scope="module")
def sent(tmp_path_factory):
    """What a stand-in was sent of one run for each ending; one process of the client serves all."""
    root = tmp_path_factory.mktemp("online")
    logging = LoggingConfig(wandb=WandbMode.online, group="strategies", tags=["small"], alerts=[Alert.diverged])
    with wandb_server() as server, pytest.MonkeyPatch.context() as variables:
        for name, value in server.environment.items():
            variables.setenv(name, value)
        wandb.teardown()  # of another test, with another server
        for run_id, ending in [*ENDINGS.items(), ("unreadable", RunEnding(RunState.done, diverged=True))]:
            run = tracked(root / run_id, logging, run_id=run_id, name=f"ddp-{run_id}", settings={"lr": 1e-4})
            opened = open_trackers_without_rows(run, {})
            assert "logging.wandb" not in opened.substitutions, "it is online"
            opened.trackers.log({"loss": 3.0, "tokens": 10, "eval/loss": 2.5}, step=1)
            opened.trackers.summarise({"final/loss": 3.0})
            if run_id == "diverged":
                server.labels[run_id] = LABELS
            opened.trackers.close(ending)
            assert opened.trackers.hints == [("W&B", f"{server.address}/us/shardtune/runs/{run_id}")]
        wandb.teardown()
    return server


@pytest.mark.parametrize("run_id", ENDINGS)
def test_online_run_is_sent_whole(sent, run_id):
    begun = next(call for call in sent.variables("UpsertBucket") if call["name"] == run_id)
    assert (begun["displayName"], begun["groupName"], begun["tags"]) == (f"ddp-{run_id}", "strategies", ["small"])
    assert '"lr":{"value":0.0001}' in begun["config"].replace(" ", "")
    (row,) = sent.rows(run_id)
    assert {"eval/loss": 2.5, "_step": 1}.items() <= row.items() and 3.0 in row.values()
    summary = sent.summary(run_id)
    assert (summary["final/loss"], summary["state"]) == (3.0, run_id)
    ending = ENDINGS[run_id]
    assert sent.ending(run_id)["exitcode"] == ending.exit_code
    assert any(message.get("preempting") for message in sent.streamed_of(run_id)) == (run_id == "preempted")


def test_online_run_sends_the_messages_that_were_asked_for(sent):
    alert = sent.variables("NotifyScriptableRunAlert")[0]
    assert (alert["runName"], alert["title"], alert["severity"]) == ("diverged", "ddp-diverged: diverged", "ERROR")
    assert alert["text"].endswith("loss is not finite")


def test_the_tag_of_a_diverged_run_leaves_what_people_have_written_in_the_app(sent):
    calls = [call for call in sent.variables("UpsertBucket") if call["tags"] is not None]
    newest = {call["name"]: call for call in calls}
    tags = {name: call["tags"] for name, call in newest.items()}
    assert tags.pop("diverged") == ["small", "to discuss", "diverged"]
    assert (newest["diverged"]["displayName"], newest["diverged"]["notes"]) == ("look at this", "too high a rate?")
    # Of a run whose tags cannot be read none is touched.
    assert tags == {"done": ["small"], "preempted": ["small"], "unreadable": ["small"]}
    assert sent.summary("unreadable")["state"] == "diverged"

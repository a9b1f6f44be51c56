"""`compare --follow`: the page is written again while a run goes on, and stands still when it has ended or Ctrl-C was pressed."""

import json
import shutil
import time
from pathlib import Path

import pytest

from launch.compare import follow
from launch.main import main
from tests.launch.compare.test_page import rows  # noqa: F401 - what two runs left
from trainer.session.lease import Lease

pytest.importorskip("altair")
pytest.importorskip("vl_convert")
REFRESH = 'http-equiv="refresh" content="5"'


@pytest.fixture
def run(rows, monkeypatch):  # noqa: F811
    """A run that this process owns and has not ended, at step 7."""
    directory = rows[1].directories[0]
    text = (directory / "config.yaml").read_text()
    (directory / "config.yaml").write_text(f"# sha256: {'0' * 64}\n{text}")
    (directory / "status.json").write_text(json.dumps({"state": "running", "step": 7, "time": time.time()}))
    return directory


def page(run: Path) -> str:
    return (run / "report.html").read_text().split("<script>")[0]


def at_each_rest(monkeypatch, does) -> list[str]:
    """Call `does` with the number of each rest between two pages."""
    rests: list[float] = []

    def sleep(seconds):
        rests.append(seconds)
        does(len(rests))

    monkeypatch.setattr(follow, "sleep", sleep)
    return rests


def test_compare_follow_ends_with_the_run(run, monkeypatch, capsys):
    seen = []

    def goes_on(rest):
        seen.append(page(run))
        with (run / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": 7 + rest, "loss": 2.0, "tokens": 900}) + "\n")
        if rest == 2:
            lease.release()
            (run / "status.json").write_text(json.dumps({"state": "done", "step": 9}))

    lease = Lease.acquire(run, 60)
    rests = at_each_rest(monkeypatch, goes_on)
    try:
        assert main(["compare", str(run), "--follow"]) == 0
    finally:
        lease.release()
    assert rests == [follow.PAGE_INTERVAL_S] * 2 and all(REFRESH in each for each in seen)
    assert "Running: step 7" in seen[0] and "Running: step 8" in seen[1], (
        "as its rows say, which are newer than its status"
    )
    assert REFRESH not in page(run) and "Trained 9 steps" in page(run)
    said = capsys.readouterr()
    assert "until all runs have ended; Ctrl-C ends it" in said.err and f"written: {run / 'report.html'}" in said.out


def test_compare_follow_ends_at_ctrl_c_with_a_still_page(run, monkeypatch, capsys):
    def pressed(rest):
        raise KeyboardInterrupt

    at_each_rest(monkeypatch, pressed)
    with Lease.acquire(run, 60):
        assert main(["compare", str(run), "--follow"]) == 130
    assert REFRESH not in page(run) and "Running: step 7" in page(run)
    assert "Traceback" not in capsys.readouterr().err


def test_compare_follow_does_not_wait_for_a_run_that_nobody_runs(run, monkeypatch):
    """It says that it runs; its process is gone. One that has not begun is waited for as long as another may start it."""
    begun = run.parent / "begun"
    begun.mkdir()
    shutil.copy(run / "config.yaml", begun)
    now = [0.0]
    monkeypatch.setattr(follow, "monotonic", lambda: now[0])

    def passes(rest):
        now[0] += 50

    rests = at_each_rest(monkeypatch, passes)
    assert main(["compare", str(run), "--follow"]) == 0 and not rests
    assert main(["compare", str(run), str(begun), f"to={run.parent / 'to'}", "--follow"]) == 0
    assert len(rests) == 3  # 150 s, more than QUIET_S


def test_compare_follow_refuses_what_cannot_be_followed(run, capsys):
    assert main(["compare", str(run), str(run.parent / "a-ddp"), "--follow"]) == 64
    assert "--follow: name a directory for the page" in capsys.readouterr().err


def test_pages_are_written_while_points_run(monkeypatch):
    written, now = [], [100.0]
    monkeypatch.setattr(follow, "monotonic", lambda: now[0])
    pages = follow.PeriodicPage(written.append)
    for at in (101, 104.9, 105, 106, 111):
        now[0] = at
        pages.write_if_due()
    assert written == [follow.PAGE_INTERVAL_S] * 2

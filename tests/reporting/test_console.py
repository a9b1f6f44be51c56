"""The progress bar of a terminal, on a real pseudo-terminal, and the plain lines elsewhere."""

import os
import pty
import re
import subprocess
import sys

import pytest

from tests.helpers.launching import ROOT, clean_environment
from trainer.reporting.console import Console, RunSchedule, _progress_fields

SAYS = """
from types import SimpleNamespace
from trainer.reporting import console as said
from trainer.reporting.console import Console, RunSchedule
said.time = SimpleNamespace(perf_counter=lambda: 30.0)  # seconds since the beginning, however long the bar takes to load
console = Console(enabled=True)
schedule = RunSchedule(total_steps=20, first_step=0, started_at=0.0, evaluate_every=8)
row = dict(grad_norm=1.5, lr=1e-4, tokens_per_s=4812.0, mfu=0.25, memory_gib=12.34, data_wait_s=0.002)
console.print_line("a start screen")
console.show_step({**row, "step": 10, "loss": 2.5}, schedule)
console.print_line("evaluation at step 10")
console.show_step({**row, "step": 15, "loss": 1.25, "skipped": True}, schedule)
if END:
    console.show_step({**row, "step": 20, "loss": 1.0}, schedule)
else:
    console.end_progress_bar()
print("the end")
"""


def shown(width: int, *, end: bool = True, **env: str) -> list[str]:
    """What stays on the screen of a terminal of this width, a string a line; the escapes of colours taken away."""
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", SAYS.replace("END", str(end))],
        stdout=theirs,
        cwd=ROOT,
        env=clean_environment(COLUMNS=str(width), TERM="xterm", LINES="24") | env,
    ) as process:
        os.close(theirs)
        told = b""
        try:
            while piece := os.read(ours, 65536):
                told += piece
        except OSError:  # the other end is closed
            pass
        assert process.wait() == 0
    os.close(ours)
    screen, drawn = [], [""]
    for line in told.decode().replace("\r\n", "\n").split("\n"):
        drawn += line.split("\r\x1b[2K")
        screen.append(re.sub(r"\x1b\[[0-9;]*m", "", line.split("\r\x1b[2K")[-1]))
    assert all(len(re.sub(r"\x1b\[[0-9;]*m", "", one)) < width for one in drawn)
    return screen


@pytest.fixture(scope="module")
def wide() -> list[str]:
    return shown(100)


def test_console_lines_stay_above_the_progress_bar(wide):
    assert wide[:2] == ["a start screen", "evaluation at step 10"]
    assert wide[2].startswith("step 20/20 ━━━━━━━━━━") and "loss 1.0000" in wide[2] and "eta 0 s" in wide[2]
    assert wide[3:] == ["the end", ""]


def test_console_bar_of_a_run_that_ends_early_keeps_a_line_of_its_own():
    *_, bar, end, _ = shown(120, end=False)
    assert bar.startswith("step 15/20 ") and end == "the end"
    assert (
        "skipped: not finite" in bar
        and "4,812 tok/s" in bar
        and "mem 12.3 GiB" in bar
        and "eval in 1" in bar
        and "eta 10 s" in bar
    )


def test_console_in_a_narrow_terminal_leaves_out_what_matters_least():
    *_, bar, _, _ = shown(52, end=False)
    assert "loss 1.2500" in bar and "eta 10 s" in bar and "tok/s" not in bar and "━" in bar


@pytest.mark.parametrize("why", ["no terminal", "dumb"])
def test_console_without_a_terminal_prints_a_line_for_each_interval(why, capsys, monkeypatch):
    if why == "dumb":
        lines = shown(140, TERM="dumb")
    else:
        console = Console(enabled=True)
        row = {"grad_norm": 1.5, "lr": 1e-4, "tokens_per_s": 4812.0, "memory_gib": 1.0, "data_wait_s": 0.0, "loss": 1.0}
        console.show_step({**row, "step": 20}, RunSchedule(20, 0, 0.0))
        lines = capsys.readouterr().out.split("\n")
    assert any(
        re.match(r"step 20/20 \| loss 1.0000 \| grad 1.500 \| lr 1.00e-04 \| 4,812 tok/s", line) for line in lines
    )
    assert not any("\x1b" in line for line in lines)


def test_console_log_that_cannot_be_written_ends_nothing(tmp_path, capsys):
    """Such as a rank's, when it says that a checkpoint could not be written and that the run goes on without."""
    (tmp_path / "rank-0.log").symlink_to("/dev/full")
    console = Console(enabled=True, log=tmp_path / "rank-0.log")
    for _ in range(2):
        console.print_line("warning: No space left on device; the run goes on without this checkpoint")
    assert capsys.readouterr().out.count("goes on without") == 2


def test_console_shows_the_reward_before_the_loss():
    """The loss of answers that the model wrote is near 0 by construction."""
    row = {"step": 1, "loss": 0.01, "reward": 0.5, "grad_norm": 1.0, "lr": 1e-4, "tokens_per_s": 9.0}
    row |= {"memory_gib": 1.0, "data_wait_s": 0.0}
    schedule = RunSchedule(total_steps=2, first_step=0, started_at=0.0, evaluate_every=0)
    assert _progress_fields(row, schedule)[:3] == ["step 1/2", "reward 0.500", "loss 0.0100"]
    del row["reward"]
    assert _progress_fields(row, schedule)[:2] == ["step 1/2", "loss 0.0100"]

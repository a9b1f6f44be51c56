"""A good, a diverged, an overfit, a resumed and a stopped run, as their reader meets them: screen, page, card, W&B, status."""

import json
import re
import signal
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import numpy as np
import pytest

from tests.faults.runs import Runs
from tests.helpers.covering import whole
from tests.helpers.launching import command_here
from tests.helpers.tokenizers import WORDS, write_jsonl
from tests.helpers.wandb_files import record, summary

SETTINGS = [
    *(
        "tuning=full",
        "schedule=constant",
        "schedule.warmup_share=0",
        "budget.steps=30",
        "batch.global=4",
        "batch.micro=4",
    ),
    *(
        "evaluation.every_steps=10",
        "checkpoint.every_steps=10",
        "challenges.forgetting.action=off",
        "export.at_end=true",
    ),
    *("logging.wandb=offline", "logging.report=true", "logging.alerts=[diverged]"),
]
ENDS = {
    "good": ["optim.lr=3e-3"],
    "diverged": ["optim.lr=3"],
    "overfit": ["optim.lr=3e-2", "data.path={root}/few.jsonl", "budget.steps=80"],
    "resumed": ["optim.lr=3e-3"],
    "stopped": ["optim.lr=3e-3"],
}
"""Words of each run. The last two are stopped at step 12; one of them is started again."""
STOPPED_AT = 12


@dataclass
class End:
    """What a reader finds of a run that has ended."""

    code: int
    last_lines: str
    """What the screen said last: from `done:` or the line of the stop on."""
    verdict: tuple[str, str]
    """Tone and heading at the head of `report.html`."""
    callouts: list[str]
    """Headings of the page's call-outs."""
    commands: list[str]
    """All that the page proposes to type."""
    card: str
    """The model card; empty if nothing was exported."""
    state: tuple[str, str | None]
    """State and reason in `status.json`."""
    in_wandb: tuple[str, int, list[str]]
    """State in the summary, exit code and tags."""
    has_alert: bool
    status: str
    """The run's lines in `shardtune status`."""


def write_data(root: Path) -> None:
    drawn = np.random.default_rng(0)
    words = sorted(set(WORDS.split()))
    for name, count in (("train", 64), ("held-out", 72), ("few", 8)):
        texts = [{"prompt": f"{n}\n", "completion": " ".join(drawn.choice(words, 6))} for n in range(count)]
        write_jsonl(root / f"{name}.jsonl", texts)


def run_all(runs: Runs) -> dict[str, int]:
    """Exit codes of the five runs."""
    codes = {}
    for name, own in ENDS.items():
        words = [*SETTINGS, f"data.eval_path={runs.root}/held-out.jsonl"]
        words += [word.format(root=runs.root) for word in own]
        if name in ("resumed", "stopped"):
            process = runs.start(name, *words, **runs.held_at(name, STOPPED_AT))
            runs.wait_for_step(name, STOPPED_AT, process)
            process.send_signal(signal.SIGTERM)
            codes[name] = runs.end(process)
        if name != "stopped":
            codes[name], _ = runs.run_here(name, *words)
    return codes


def end_of(runs: Runs, name: str, code: int, status: str) -> End:
    """What a run left behind. `status`: what `shardtune status` printed of all runs."""
    run = runs.root / name
    said = runs.said(name)
    last_lines = said[re.search(r"^done:|^.*stopped at step", said, re.MULTILINE).start() :]
    page = (run / "report.html").read_text()
    page = re.sub(r"<(script|style)\b.*?</\1>|<span.*?</span>", "", page, flags=re.DOTALL)
    card = run / "export" / "README.md"
    part = sorted((run / "wandb").glob("offline-run-*"))[-1]
    tracked = summary(part)
    ended = json.loads((run / "status.json").read_text())
    return End(
        code=code,
        last_lines=last_lines,
        verdict=re.findall(r'<div class="action (\w+)"><h2>(.*?)</h2>', page)[0],
        callouts=re.findall(r'<p class="heading">(.*?)</p>', page),
        commands=re.findall(r"<pre[^>]*><code>(.*?)</code>", page),
        card=card.read_text() if card.exists() else "",
        state=(ended["state"], ended["reason"]),
        in_wandb=(tracked["summary"].get("state"), tracked["exit_code"], tracked["tags"]),
        has_alert=bool(record(part, "alert")),
        status=re.search(rf"^{name} .*\n(  .*\n)?", status, re.MULTILINE)[0],
    )


@pytest.fixture(scope="module")
def ends(tmp_path_factory, pages_of_runs):
    runs = Runs(tmp_path_factory.mktemp("ends"))
    write_data(runs.root)
    try:
        codes = run_all(runs)
    finally:
        runs.close()
    told = StringIO()
    with redirect_stdout(told):
        assert command_here(["status", str(runs.root)]) == 0
    return runs.root, {name: end_of(runs, name, code, told.getvalue()) for name, code in codes.items()}


@whole("its parts: last lines in test_last_lines.py, pages in test_run_page.py, states in test_wandb_run.py")
def test_five_ends_of_runs_are_told_apart_by_state_verdict_and_tracker(ends):
    _, ends = ends
    later = "stopped at step {step} of 30; start the same run again to continue"
    step = int(re.search(r"stopped at step (\d+)", ends["stopped"].last_lines)[1])
    assert step >= STOPPED_AT
    assert {name: (end.code, *end.verdict) for name, end in ends.items()} == {
        "good": (0, "good", "Held-out loss got better"),
        "diverged": (0, "bad", "The run diverged"),
        "overfit": (0, "bad", "The model is worse than before training"),
        "resumed": (0, "good", "Held-out loss got better"),
        "stopped": (75, "warning", f"Stopped at step {step} of 30"),
    }
    states = {name: end.state for name, end in ends.items()}
    assert states["overfit"][0] == "done" and "worse than before training, since step 30" in states.pop("overfit")[1]
    assert states == {
        "good": ("done", None),
        "diverged": ("done", "diverged, since step 20"),
        "resumed": ("done", None),
        "stopped": ("preempted", later.format(step=step)),
    }
    assert {name: (*end.in_wandb, end.has_alert) for name, end in ends.items()} == {
        "good": ("done", 0, [], False),
        "diverged": ("diverged", 0, ["diverged"], True),
        "overfit": ("done", 0, [], False),
        "resumed": ("done", 0, [], False),
        "stopped": ("preempted", 75, [], False),
    }
    for name, end in ends.items():
        state, reason = end.state
        assert end.status.split()[:2] == [name, state]
        assert (reason or "")[:30] in end.status and (reason is None) == (end.status.count("\n") == 1)


@whole("its parts: last lines in test_last_lines.py, pages in test_run_page.py, states in test_wandb_run.py")
def test_five_ends_of_runs_are_told_apart_by_last_lines_page_and_card(ends):
    root, ends = ends
    good, resumed, stopped = ends["good"], ends["resumed"], ends["stopped"]
    assert "warning:" not in good.last_lines and good.callouts == [] and good.commands == []
    assert f"next:       shardtune chat {root / 'good'}" in good.last_lines
    assert "since step" not in good.card and "## Evaluation" in good.card

    diverged = ends["diverged"]
    assert "warning:    diverged, since step 20: the training loss went from" in diverged.last_lines
    assert "next:       train again in another run.dir, with a lower optim.lr" in diverged.last_lines
    lower = f"shardtune train {root / 'diverged'}/config.yaml run.dir={root / 'diverged'}-lower-rate optim.lr=0.3"
    assert lower in diverged.commands and diverged.callouts[0] == "No step is better than the model before training"
    assert "- **diverged**, since step 20" in diverged.card

    overfit = ends["overfit"]
    assert "warning:    worse than before training, since step 30" in overfit.last_lines
    assert "overfits?   yes: held-out loss best at step 10" in overfit.last_lines
    assert {"The run overfits", "Step 10 was the best"} <= {*overfit.callouts}
    assert "- **overfitting**, since step 80" in overfit.card and "the weights of step 10, the best" in overfit.card

    # A run that goes on ends as if nothing had happened: the same weights and numbers, of two parts.
    assert resumed.callouts == ["The run was resumed"]
    assert resumed.commands == [f"shardtune status {root / 'resumed'}"]
    measured = re.compile(r"^  eval/.*$", re.MULTILINE)
    assert measured.findall(resumed.last_lines) == measured.findall(good.last_lines) != []
    assert [end.last_lines.count("offline-run-") for end in (good, resumed)] == [1, 2]

    assert stopped.last_lines.startswith(f"{root / 'stopped'}: stopped at step ")
    assert "saved; the same command continues it" in stopped.last_lines and "done:" not in stopped.last_lines
    assert stopped.card == "" and stopped.callouts == []

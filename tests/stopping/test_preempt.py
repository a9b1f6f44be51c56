"""A run that is told to stop saves, says so, and continues to the very numbers of one that was left alone."""

import json
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.faults.runs import PACED
from tests.helpers.building import model_dir
from tests.helpers.covering import EVERYTHING
from tests.helpers.launching import clean_environment
from tests.helpers.speed import seconds
from tests.helpers.tokenizers import write_chat_data
from tests.helpers.warm import command_warm, forked

STEPS = 20


def command(root: Path, run: str, *words: str) -> list[str]:
    settings = {
        "model.path": model_dir(root),
        "data.path": root / "train.jsonl",
        "data.eval_path": root / "eval.jsonl",
        "data.cache_dir": root / "cache",
        "run.dir": root / run,
        "run.device": "cpu",
        "run.threads": 1,
        "run.matmul": "blas",
        "batch.global": 4,
        "batch.micro": 2,
        "budget.steps": STEPS,
        "optim.lr": 1e-3,
        "model.dropout": 0.1,  # so that the random stream must be right, too
        "tuning": "lora",
        "tuning.dropout": 0.1,
        "logging.every_steps": 1,
        "logging.wandb": "disabled",
        "evaluation.every_steps": 8,
        "export.at_end": "false",
    }
    return [sys.executable, "-m", "launch.main", "train", *(f"{k}={v}" for k, v in settings.items()), *words]


def rows(root: Path, run: str) -> list[dict]:
    path = root / run / "metrics.jsonl"
    whole, _, _ = path.read_text().rpartition("\n") if path.exists() else ("", "", "")  # one may be being written
    return [json.loads(line) for line in whole.splitlines()]


def numbers(root: Path, run: str) -> list[tuple]:
    keys = ("step", "loss", "grad_norm", "lr", "tokens", "eval/loss", "eval/accuracy")
    return [tuple(row.get(key) for key in keys) for row in rows(root, run)]


def stop_after(root: Path, run: str, step: int, number: int, words: list[str]) -> int:
    held = {"PACE_GATE": str(root / f"{run}.told"), "PACE_LAST": str(step)}
    with (root / f"{run}.out").open("w") as out:
        process = forked(command(root, run, *words), clean_environment(**PACED, **held), out.fileno())
    deadline = time.monotonic() + seconds(120)
    while not any(row["step"] >= step for row in rows(root, run)):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(number)
    return process.wait(timeout=seconds(60))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    path = tmp_path_factory.mktemp("preempt")
    write_chat_data(path / "train.jsonl", 48)
    write_chat_data(path / "eval.jsonl", 12, seed=1)
    return path


# That ranks resume to the last bit is shown for every strategy in tests/parity, and that they save when told to in tests/faults.
STRATEGIES = {
    "alone": ["strategy=single", "launcher.processes=1"],
    "fsdp2": ["strategy=fsdp2", "launcher.processes=2"],
    "zero2": ["strategy=zero2", "launcher.processes=2"],
}


@pytest.mark.parametrize(("name", "words"), list(STRATEGIES.items())[: None if EVERYTHING else 1])
def test_stopped_run_continues_bit_for_bit(root, capsys, name, words):
    whole = command(root, f"{name}-whole", *words)
    assert command_warm(whole[3:]) == 0
    assert stop_after(root, f"{name}-cut", 5, signal.SIGUSR1, words) == 75
    assert "the same command continues it" in (root / f"{name}-cut.out").read_text()
    status = json.loads((root / f"{name}-cut" / "status.json").read_text())
    assert status["state"] == "preempted"
    reached = status["step"]
    assert 5 <= reached < STEPS, "the run was over before the signal came"
    assert [r["step"] for r in rows(root, f"{name}-cut")][-1] == reached
    assert command_warm(command(root, f"{name}-cut", *words)[3:]) == 0
    assert numbers(root, f"{name}-cut") == numbers(root, f"{name}-whole")
    assert len(numbers(root, f"{name}-whole")) == STEPS + 4  # evaluations at 0, 8, 16 and the end
    if name != "alone":
        return
    capsys.readouterr()
    assert command_warm(command(root, f"{name}-cut", *words)[3:]) == 0
    assert "already finished" in capsys.readouterr().out

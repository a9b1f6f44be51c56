"""The blocks of docs/extending.md, applied to a copy of the code: an objective, a schedule, a method, a task, a tracker."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.building import model_dir
from tests.helpers.launching import ROOT, clean_environment
from tests.helpers.speed import seconds
from tests.helpers.tokenizers import pair_rows, write_jsonl

BLOCK = re.compile(r"<!-- (file|after|before): (.+?) -->\n```\w+\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGE = ROOT / "docs" / "extending.md"


def apply(mark: str, place: str, text: str, root: Path) -> None:
    """Do what the page says: write a file, or put lines after or before the first line that has some text."""
    if mark == "file":
        path = root / place
        assert not path.exists(), f"{place} exists already: the page needs another example"
        path.write_text(text, encoding="utf-8")
        return
    file, anchor = place.split(" | ")
    path = root / file
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    at = next((number for number, line in enumerate(lines) if anchor in line), None)
    assert at is not None, f"{file} has no line with {anchor!r}; docs/extending.md says it has"
    if mark == "before" and lines[at].startswith("class ") and lines[at - 1].startswith("@"):
        at -= 1  # its decorator belongs to it
    if mark == "after":
        at += 1
    lines.insert(at, text)
    path.write_text("".join(lines), encoding="utf-8")


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
    """A copy of the code with everything that the page adds."""
    root = tmp_path_factory.mktemp("extended")
    for folder in ("launch", "trainer", "strategies", "conf"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    blocks = BLOCK.findall(PAGE.read_text(encoding="utf-8"))
    assert len(blocks) >= 15
    for mark, place, text in blocks:
        apply(mark, place, text, root)
    return root


def run(root, *words, cwd):
    return subprocess.run(
        [sys.executable, "-m", "launch.main", *words],
        env=clean_environment(PYTHONPATH=str(root), WANDB_MODE="disabled", HOME=str(cwd)),
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=seconds(200),
    )


def test_everything_that_the_page_adds_trains_together(extended, tmp_path):
    write_jsonl(tmp_path / "pairs.jsonl", pair_rows(24, seed=0))
    write_jsonl(
        tmp_path / "questions.jsonl",
        [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pair_rows(4, seed=1)],
    )
    model = model_dir(tmp_path)
    words = (
        f"train model.path={model} data.path=pairs.jsonl objective=cpo schedule=inverse_sqrt schedule.warmup_steps=1 "
        "tuning=c3a tuning.block_size=8 optim.lr=1e-2 logging.csv=true evaluation.tasks.facts.kind=contains "
        "evaluation.tasks.facts.path=questions.jsonl evaluation.tasks.facts.write.max_new_tokens=4 data.eval_share=0.2 "
        "batch.global=4 batch.micro=2 budget.steps=3 run.dir=run run.device=cpu"
    )
    done = run(extended, *words.split(), cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    assert len(steps) == 3 and all("margin" in row for row in steps)
    # The factor at the steps with index 0, 1 and 2, after one step of warm-up: 1, 1 and 1 / sqrt(2).
    assert [row["lr"] for row in steps] == pytest.approx([1e-2, 1e-2, 1e-2 / 2**0.5])
    assert any("eval/facts/contains" in row for row in rows)
    assert json.loads((tmp_path / "run" / "export" / "adapter_config.json").read_text())["peft_type"] == "C3A"
    numbers = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    assert sum(line.split(",")[1].endswith("loss") for line in numbers) >= 3

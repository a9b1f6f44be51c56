"""The examples of the topic pages run, in the order of the page, on a tiny model and made-up data.

docs/marked_blocks.py says how blocks are marked. Those that say `run real` need the demo's own model: docs/make_lessons.py runs
them.
`shardtune` commands run in this process and their ranks are forked (`tests/helpers/warm.py`), which spares their start; all else
is a process of its own.
"""

import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Hashable
from pathlib import Path

import pytest

from launch.main import main
from tests.helpers.building import model_dir
from tests.helpers.covering import EVERYTHING, chosen
from tests.helpers.launching import ROOT, clean_environment
from tests.helpers.speed import seconds
from tests.helpers.tokenizers import write_chat_data
from tests.helpers.warm import forked_ranks, run_ranks

marked_blocks = runpy.run_path(str(ROOT / "docs" / "marked_blocks.py"))["marked_blocks"]


def blocks(text):
    """The marked blocks of a page that need no model of their own."""
    return [block for block in marked_blocks(text) if block.mark != "run real"]


PAGES = sorted(path for path in (ROOT / "docs").rglob("*.md") if blocks(path.read_text(encoding="utf-8")))

SHOWN_ELSEWHERE = ("plan", "compare")
"""Verbs whose examples `make test` runs only where a page is chosen for others.

tests/launch/plan and tests/launch/compare run both, and test_pages.py composes each command of every page.
"""
NEEDS = {"qlora": "bitsandbytes", "lm-eval": "lm_eval", "deployment": "bitsandbytes"}
"""Packages of extras without which a page's examples cannot run."""


def run(block, page: Path) -> None:
    """Do what a reader would do with the block, in the current directory."""
    if block.file is not None:
        Path(block.file).write_text(block.text)
    elif block.language == "python":
        exec(compile("\n" * (block.line - 1) + block.text, str(page), "exec"), {"__name__": "example"})
    else:
        for command in filter(None, block.text.replace("\\\n", " ").splitlines()):
            words = shlex.split(os.path.expandvars(command))
            if words[0] == "shardtune":
                with forked_ranks():
                    code = main(words[1:])
                assert code == 0, f"{page.name}:{block.line}: {command}"
            else:
                assert words[0] == "torchrun", f"{page.name}:{block.line}: how is this run? {command}"
                torchrun(words[1:])


def torchrun(words: list[str]) -> None:
    """torchrun itself in `make test-all`, and in test_ranks.py and the jobs of SLURM; else the ranks that it would start."""
    if not EVERYTHING:
        flags, module = words[: words.index("-m")], words[words.index("-m") :]
        [world] = [int(flag.partition("=")[2]) for flag in flags if flag.startswith("--nproc-per-node=")]
        run_ranks(module, world, cwd=Path.cwd())
        return
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *words],
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=seconds(300),
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    path = tmp_path_factory.mktemp("docs")
    model_dir(path, hidden_size=64)  # whose matrices every processor multiplies in 4 bits
    write_chat_data(path / "train.jsonl", 48)
    write_chat_data(path / "held-out.jsonl", 12, seed=1)
    return path


@pytest.fixture
def reader(site, tmp_path, monkeypatch):
    """A reader's shell: an empty directory, the variables of docs/README.md, and no data of other runs."""
    monkeypatch.chdir(tmp_path)
    for key in set(os.environ) - set(clean_environment()):
        monkeypatch.delenv(key)
    for key, value in clean_environment(
        MODEL=str(site / "llama"),
        DATA=str(site / "train.jsonl"),
        HELD_OUT=str(site / "held-out.jsonl"),
        HOME=str(tmp_path),  # the cache of prepared data
    ).items():
        monkeypatch.setenv(key, value)


def commands(page: Path) -> list[list[str]]:
    marked = blocks(page.read_text(encoding="utf-8"))
    shell = [block.text for block in marked if block.mark == "run" and block.language in ("bash", "text")]
    return [shlex.split(line) for text in shell for line in text.replace("\\\n", " ").splitlines() if line.strip()]


def shown(page: Path) -> set[Hashable]:
    """What the examples of a page show: verbs, and the first part of every setting."""
    proving = [command for command in commands(page) if command[1] not in SHOWN_ELSEWHERE]
    words = [word for command in proving for word in command]
    verbs = {tuple(command[:2]) for command in proving if command[0] in ("shardtune", "torchrun")}
    return verbs | {re.split(r"[.=]", word)[0] for word in words if "=" in word}


def asked(page: Path) -> int:
    return len(commands(page)) or 1


def named(page: Path) -> str:
    """The page's path below docs/, without its suffix."""
    return page.relative_to(ROOT / "docs").with_suffix("").as_posix()


@pytest.mark.parametrize("page", chosen(PAGES, shown, asked), ids=named)
def test_the_examples_of_a_page_run(page, reader, monkeypatch):
    if page.stem != "tracking":  # which shows what W&B's files are for; a run with them takes half as long again
        monkeypatch.setenv("WANDB_MODE", "disabled")
    if (package := NEEDS.get(page.stem)) is not None:
        pytest.importorskip(package)
    for block in blocks(page.read_text(encoding="utf-8")):
        run(block, page)


def test_every_topic_page_has_examples():
    assert {page.stem for page in PAGES} >= {
        "evaluation",
        "01-what-fine-tuning-is",
        "02-why-and-when-not",
        "03-types",
        "04-data",
        "05-workflow",
        "lora",
        "qlora",
        "adapters",
        "choosing-a-strategy",
        "torchrun-and-slurm",
        "preference-tuning",
        "reinforcement",
        "objectives",
        "challenges",
        "ethics",
        "papers",
        "review",
    }


def test_no_mark_is_overlooked():
    """A mark with a blank line after it, or a fence that never ends, would drop its block in silence."""
    for page in (ROOT / "docs").rglob("*.md"):
        text = page.read_text(encoding="utf-8")
        marks = len(re.findall(r"^<!-- (run|run real|run tiny|file: .+) -->$", text, re.MULTILINE))
        assert marks == len(marked_blocks(text)), page.name


def bash_block(command):
    [block] = blocks(f"<!-- run -->\n```bash\n{command}\n```\n")
    return block


def test_a_wrong_example_fails(reader):
    with pytest.raises(AssertionError):
        run(bash_block("shardtune train model.path=$MODEL data.path=$DATA optim.lrr=1"), Path("x.md"))
    with pytest.raises(AssertionError):
        run(bash_block("rm -r x"), Path("x.md"))

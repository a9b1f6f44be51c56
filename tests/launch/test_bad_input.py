"""Mistakes that users make: each ends with one screen of message and its exit code, and leaves nothing half-done."""

import json
import resource
import subprocess
import sys

import pytest

from launch.main import main
from tests.helpers.building import model_dir
from tests.helpers.launching import ROOT, clean_environment
from tests.helpers.tokenizers import write_chat_data, write_jsonl


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    path = tmp_path_factory.mktemp("bad")
    model_dir(path)
    write_chat_data(path / "good.jsonl", 24)
    (path / "torn.jsonl").write_text((path / "good.jsonl").read_text() + '{"messages": [{"role": "user"\n')
    write_jsonl(path / "short.jsonl", [{"prompt": "a very long question " * 40, "completion": "yes"}] * 8)
    return path


def words(root, **changes):
    settings = {
        "model.path": root / "llama",
        "data.path": root / "good.jsonl",
        "data.cache_dir": root / "cache",
        "run.dir": root / "run",
        "run.device": "cpu",
        "run.threads": 1,
        "launcher.processes": 1,
        "batch.global": 8,
        "batch.micro": 4,
        "budget.steps": 2,
        "logging.wandb": "disabled",
        "export.at_end": "false",
    }
    settings.update({key.replace("__", "."): value for key, value in changes.items()})
    return ["train", *(f"{key}={value}" for key, value in settings.items())]


CASES = {
    "misspelt key": ({"optim__lrr": 1e-3}, 64, ["optim.lrr", "optim.lr"]),
    "misspelt choice": ({"strategy": "fdsp2"}, 64, ["fdsp2", "fsdp2"]),
    "wrong type": ({"optim__lr": "fast"}, 64, ["optim.lr", "fast"]),
    "batch not divisible": ({"batch__global": 10}, 64, ["batch.global", "10", "4"]),
    "several at once": (
        {"optim__lr": -1, "batch__micro": 0, "budget__steps": 0, "schedule": "cosin"},
        64,
        ["optim.lr", "batch.micro", "budget.steps", "cosine"],
    ),
    "key of another choice": ({"tuning__rank": 8}, 64, ["tuning.rank", "tuning=lora"]),
    "no such data file": ({"data__path": "{root}/goood.jsonl"}, 64, ["goood.jsonl", "data.path"]),
    "malformed line": ({"data__path": "{root}/torn.jsonl"}, 65, ["torn.jsonl:25"]),
    "no such model": ({"model__path": "{root}/lama"}, 64, ["lama", "model.path"]),
    "no such hub model": ({"model__path": "nobody/nothing"}, 64, ["nobody/nothing", "model.download"]),
    "unmatched target": ({"tuning": "lora", "tuning__targets": "[q_prj]"}, 64, ["q_prj", "q_proj", "all-linear"]),
    "nothing supervised": (
        {"data__path": "{root}/short.jsonl", "data__max_length": 32},
        65,
        ["supervised", "data.max_length"],
    ),
    "single with two processes": ({"launcher__processes": 2}, 64, ["strategy=single", "launcher.processes"]),
    "token already known": ({"model__add_tokens": "[hello,<s>]"}, 64, ["<s>", "model.add_tokens"]),
}


@pytest.mark.parametrize("name", CASES)
def test_message_and_exit_code(root, capfd, name):
    changes, code, mentioned = CASES[name]
    changes = {key: str(value).format(root=root) for key, value in changes.items()}
    assert main(words(root, **changes)) == code
    shown = capfd.readouterr().err
    for text in mentioned:
        assert text in shown, shown
    assert "Traceback" not in shown
    assert len(shown.splitlines()) < 25
    assert not list((root / "run").glob("checkpoints/*"))


def test_full_disk_at_checkpoint_time(tmp_path, root):
    """No file may grow beyond 60 kB in this process: the state cannot be written, everything else can."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))

    run = tmp_path / "run"
    command = words(root, run__dir=run, budget__steps=6, checkpoint__every_steps=2)
    script = (
        "import signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from launch.main import main\nsys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *command],
        env=clean_environment(),
        cwd=ROOT,
        preexec_fn=limit,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 74, done.stderr
    assert "checkpoint" in done.stderr and "free space" in done.stderr
    assert list((run / "checkpoints").iterdir()) == []
    assert json.loads((run / "status.json").read_text())["state"] == "failed"
    # With room again, the same command runs to the end.
    assert main(command) == 0
    assert [p.name for p in sorted((run / "checkpoints").iterdir())] == ["step-000004", "step-000006"]

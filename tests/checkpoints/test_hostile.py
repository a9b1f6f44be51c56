"""Somebody else's checkpoints, from end to end: what they bring along never runs, whichever command meets them."""

import hashlib
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest

from launch.main import main
from strategies.durable import Written
from tests.helpers.building import model_dir
from tests.helpers.tokenizers import write_chat_data
from trainer.checkpoints.seal import seal


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A directory with a finished run, `theirs`, of four steps."""
    path = tmp_path_factory.mktemp("hostile")
    model_dir(path)
    write_chat_data(path / "train.jsonl", 16)
    before = dict(os.environ)
    assert main(words(path, "theirs")) == 0
    os.environ.clear()
    os.environ.update(before)
    return path


def words(root: Path, run: str, *more: str) -> list[str]:
    settings = {
        "model.path": root / "llama",
        "data.path": root / "train.jsonl",
        "data.cache_dir": root / "cache",
        "run.dir": root / run,
        "run.device": "cpu",
        "tuning": "lora",
        "batch.global": 4,
        "batch.micro": 4,
        "budget.steps": 4,
        "logging.wandb": "disabled",
        "export.at_end": "false",
    }
    return ["train", *(f"{key}={value}" for key, value in settings.items()), *more]


class Payload:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return (Path.touch, (self.marker,))


def as_early_versions_wrote(step: Path, payload: bytes) -> None:
    """What ran code: a pickle as the metadata of the tensors, under a manifest that fits it."""
    for path in list(step.iterdir()):
        path.unlink()
    (step / "state").mkdir()
    (step / "state" / ".metadata").write_bytes(payload)
    (step / "state" / "__0_0.distcp").write_bytes(payload)
    (step / "progress.json").write_text(
        json.dumps({"progress": {"step": 4}, "optimizer_steps": 4, "world_size": 1, "strategy": "single"})
    )
    files = [path for path in step.rglob("*") if path.is_file()]
    table = {
        str(path.relative_to(step)): {
            "bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in files
    }
    (step / "manifest.json").write_text(json.dumps(table, indent=1))


def as_now(name: str):
    def plant(step: Path, payload: bytes) -> None:
        (step / name).write_bytes(payload)
        files = [path for path in step.iterdir() if path.name != "manifest.json"]
        seal(step, [Written(p.name, p.stat().st_size, hashlib.sha256(p.read_bytes()).hexdigest()) for p in files])

    return plant


PLANTED = {
    "early": (as_early_versions_wrote, "early version"),
    "index.json": (as_now("index.json"), "index.json"),
    "progress.json": (as_now("progress.json"), "progress.json"),
    "tensors": (as_now("rank-00000.safetensors"), "cannot be read"),
    ".metadata": (as_now(".metadata"), "damaged manifest"),
}


@pytest.mark.parametrize("where", PLANTED)
def test_a_pickle_is_never_read(root, tmp_path, where, capfd):
    """On resuming the directory, on `run.resume=` of it, and on its export."""
    plant, said = PLANTED[where]
    theirs = tmp_path / "theirs"
    shutil.copytree(root / "theirs", theirs)
    (step,) = (theirs / "checkpoints").iterdir()
    plant(step, pickle.dumps(Payload(tmp_path / "executed")))
    (theirs / "status.json").unlink()
    ways = [
        words(root, "x", f"run.dir={theirs}"),
        words(root, "x", f"run.dir={tmp_path / 'mine'}", f"run.resume={step}"),
        ["export", f"run.dir={theirs}", f"to={tmp_path / 'exported'}"],
    ]
    for way in ways:
        before = dict(os.environ)
        code = main(way)
        os.environ.clear()
        os.environ.update(before)
        shown = capfd.readouterr().err
        assert "Traceback" not in shown and not (tmp_path / "executed").exists()
        assert code in (64, 74) and said in shown, (way, code, shown)

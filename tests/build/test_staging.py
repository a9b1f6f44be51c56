"""Copies on a disk of the node: made once, checked, kept while they are needed, and never more than there is room for."""

import json
import os
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from strategies.errors import ConfigError, Preempted, StorageError
from tests.helpers.launching import command_here
from tests.helpers.models import tiny_model_dir
from tests.helpers.tokenizers import tiny_tokenizer, write_chat_data
from trainer.build import parts, staging
from trainer.build.staging import stage
from trainer.config.run import LauncherConfig, ModelConfig


@pytest.fixture
def made(tmp_path):
    """A model and prepared data, as files of random bytes; `at(...)` stages them, with the configuration's words."""
    files = {"model/model.safetensors": 5_000_000, "model/config.json": 100, "model/pytorch_model.bin": 9}
    files |= {"data/tokens.bin": 70_000, "data/train/index.npy": 1000, "data/documents.arrow": 9}
    for name, size in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(os.urandom(size))

    def at(place=tmp_path / "disk", stop=lambda: False):
        config = SimpleNamespace(
            launcher=LauncherConfig(stage=str(place)), model=ModelConfig(path=str(tmp_path / "model"))
        )
        return stage(config, SimpleNamespace(directory=tmp_path / "data", has_rows=True), should_stop=stop)

    at.root = tmp_path / "disk" / f"shardtune-{os.getuid()}"
    at.source = tmp_path
    return at


def copies(root: Path) -> set[str]:
    return {path.name.partition("-")[0] for path in root.iterdir() if path.is_dir()}


def test_staging_copies_only_the_files_that_are_read_byte_for_byte(made):
    staged = made()
    model, data = staged.copies["model"].path, staged.copies["data"].path
    assert {path.name for path in model.iterdir()} == {"model.safetensors", "config.json", "copy.json"}
    assert {path.relative_to(data).as_posix() for path in data.rglob("*") if path.is_file()} == {
        "tokens.bin",
        "train/index.npy",
        "copy.json",
    }
    assert (model / "model.safetensors").read_bytes() == (made.source / "model" / "model.safetensors").read_bytes()
    assert staged.run_record_entry()["staged"]["model"] == {
        "from": str(made.source / "model"),
        "to": str(model),
        "bytes": 5_000_100,
    }


def test_staging_copies_once_a_node_and_the_last_process_removes_the_copy(made, capfd):
    found = []
    both = [threading.Thread(target=lambda: found.append(made())) for _ in range(2)]
    for each in both:
        each.start()
    for each in both:
        each.join()
    assert capfd.readouterr().err.count("staging model") == 1
    found[0].release()
    assert copies(made.root) == {"model", "data"}  # the other one reads them
    found[1].release()
    assert copies(made.root) == set()


def test_staging_reuses_a_copy_unless_it_is_damaged_or_its_source_changed(made, capfd):
    first = made().copies["model"].path
    capfd.readouterr()
    assert made().copies["model"].path == first and capfd.readouterr().err == ""
    with (first / "model.safetensors").open("r+b") as file:
        file.write(b"another")
    assert made().copies["model"].path == first
    assert "is not as it was copied; it is copied again" in capfd.readouterr().err
    assert (first / "model.safetensors").read_bytes() == (made.source / "model" / "model.safetensors").read_bytes()
    (made.source / "model" / "config.json").write_text("{}")
    assert made().copies["model"].path != first and "staging model" in capfd.readouterr().err


def test_staging_without_room_is_refused_with_numbers_and_unused_copies_make_room(made, monkeypatch):
    free = [5_000_000]
    usage = SimpleNamespace(total=0, used=0)
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda _: SimpleNamespace(**vars(usage), free=free[0]))
    with pytest.raises(
        StorageError, match=r"0\.00 GiB are to be copied to .*\(model 0\.00, data 0\.00\), and 0\.00 GiB"
    ):
        made()
    free[0] = 10**9
    used = made()
    (made.source / "model" / "config.json").write_text("{}")  # another model now
    free[0] = 10
    with pytest.raises(StorageError, match=r"launcher\.stage="):
        made()
    assert copies(made.root) == {"model", "data"}  # in use
    for copy in used.copies.values():
        os.close(copy.lock_descriptor)  # as of a process that was killed
    removed = staging._remove_copy
    monkeypatch.setattr(staging, "_remove_copy", lambda path: (removed(path), free.__setitem__(0, 10**9)))
    now = made().copies["model"].path
    assert [path for path in made.root.glob("model-*") if path.is_dir()] == [now]


def test_staging_removes_copies_left_a_week_ago(made):
    left = made()
    for copy in left.copies.values():
        os.close(copy.lock_descriptor)
        os.utime(f"{copy.path}{staging.IN_USE_SUFFIX}", (0, 0))
    (made.source / "model" / "config.json").write_text("{}")
    model = left.copies["model"].path
    made()
    assert not model.exists() and not Path(f"{model}{staging.IN_USE_SUFFIX}").exists()
    assert left.copies["data"].path.exists()  # which is used again


def test_staging_that_is_stopped_leaves_nothing(made):
    with pytest.raises(Preempted, match="the copy will start over"):
        made(stop=lambda: True)
    assert copies(made.root) == set() and not list(made.root.glob(".*.partial"))


def test_staging_names_a_disk_that_cannot_be_written_and_an_unset_variable(made, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"launcher\.stage=.*file.*Not a directory; name a disk of the node"):
        made(tmp_path / "file")
    monkeypatch.delenv("NODE_DISK", raising=False)
    with pytest.raises(ConfigError, match=r"\$NODE_DISK/me names a variable that is not set on"):
        made("$NODE_DISK/me")
    monkeypatch.setenv("NODE_DISK", str(tmp_path / "other"))
    assert made("$NODE_DISK/me").copies["data"].path.is_relative_to(tmp_path / "other" / "me")


def test_staging_run_reads_the_copies_and_records_the_given_paths(tmp_path, monkeypatch):
    tiny_tokenizer().save_pretrained(tiny_model_dir(tmp_path / "model"))
    data = write_chat_data(tmp_path / "train.jsonl", 16)
    words = [f"model.path={tmp_path / 'model'}", f"data.path={data}", f"data.cache_dir={tmp_path / 'cache'}"]
    words += [
        "run.matmul=blas",
        "data.eval_share=0.2",
        "budget.steps=2",
        "batch.global=4",
        "batch.micro=2",
        "run.device=cpu",
    ]
    words += ["logging.wandb=disabled", "logging.report=false", "logging.every_steps=1"]
    assert command_here(["train", *words, f"run.dir={tmp_path / 'plain'}"]) == 0
    read = []
    known = parts.find_weights_directory
    monkeypatch.setattr(parts, "find_weights_directory", lambda config: read.append(known(config)) or read[-1])
    disk = tmp_path / "disk"
    assert command_here(["train", *words, f"launcher.stage={disk}", f"run.dir={tmp_path / 'staged'}"]) == 0

    facts = json.loads((tmp_path / "staged" / "run.json").read_text())
    # Once to train, and once to describe the model for the export.
    assert [str(path) for path in read] == 2 * [facts["staged"]["model"]["to"]]
    assert facts["staged"]["data"]["from"] == facts["data_directory"]
    rows = [
        [(row.get("loss"), row.get("eval/loss")) for row in map(json.loads, (tmp_path / run / "metrics.jsonl").open())]
        for run in ("plain", "staged")
    ]
    assert rows[0] == rows[1]
    for path in (tmp_path / "staged" / "export").glob("*.json"):
        assert str(disk) not in path.read_text(), path
    assert copies(disk / f"shardtune-{os.getuid()}") == set()  # the run is done
    shutil.rmtree(disk)

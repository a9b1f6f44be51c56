"""`shardtune export` on a run that has ended."""

import os
from pathlib import Path

import pytest

from launch.main import main
from strategies import durable
from strategies.errors import ConfigError
from tests.helpers.models import tiny_model_dir
from tests.helpers.tokenizers import tiny_tokenizer, write_chat_data

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """Six steps of LoRA with an evaluation after every second one, no export; checkpoints at steps 4 and 6."""
    folder = tmp_path_factory.mktemp("verb")
    model = tiny_model_dir(folder / "model", "llama", pad_token_id=2)
    tiny_tokenizer().save_pretrained(model)
    data, held_out = write_chat_data(folder / "train.jsonl", 16), write_chat_data(folder / "eval.jsonl", 4, seed=1)
    words = [
        f"model.path={model}",
        f"data.path={data}",
        f"data.eval_path={held_out}",
        f"data.cache_dir={folder / 'cache'}",
    ]
    words += [
        "tuning=lora",
        "optim.lr=1e-2",
        "batch.global=4",
        "batch.micro=4",
        "budget.steps=6",
        "evaluation.every_steps=2",
    ]
    words += ["checkpoint.every_steps=2", "export.at_end=false", "logging.wandb=disabled", f"run.dir={folder / 'run'}"]
    before = dict(os.environ)
    try:
        assert main(["train", *words, "run.device=cpu"]) == 0
    finally:
        os.environ.clear()
        os.environ.update(before)
    return folder / "run"


@pytest.fixture(autouse=True)
def same_environment():
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def run(*words):
    return main(["export", *map(str, words)])


def test_the_last_checkpoint_becomes_the_export_of_the_run(run_dir, capsys):
    assert run(run_dir, "--verify") == 0
    assert "export verified" in capsys.readouterr().out
    assert (run_dir / "export" / "adapter_model.safetensors").is_file()
    card = (run_dir / "export" / "README.md").read_text()
    assert "| eval/loss |" in card and "- steps: 6" in card and "base_model:" in card


def test_another_checkpoint_merged_elsewhere(run_dir, tmp_path):
    assert (
        run(f"run.dir={run_dir}", "checkpoint=4", "merge=true", "dtype=bfloat16", f"to={tmp_path / 'm'}", "verify=true")
        == 0
    )
    assert (tmp_path / "m" / "model.safetensors").is_file()
    card = (tmp_path / "m" / "README.md").read_text()
    assert "- steps: 4" in card and "| eval/loss |" not in card, "metrics of step 6 are not those of step 4"
    assert run(f"run.dir={run_dir}", "checkpoint=best", f"to={tmp_path / 'b'}") == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "run.dir: not set"),
        (["run.dir={run}", "chekpoint=4"], "did you mean checkpoint"),
        (["{run}", "run.dir={run}"], "given twice"),
        (["run.dir={run}", "to="], "needs a value"),
        (["run.dir={run}", "checkpoint=5"], "its checkpoints are 4, 6"),
        (["run.dir={run}", "merge=yes"], "true or false"),
        (["run.dir={run}", "dtype=int8"], "bfloat16"),
        (["run.dir={run}", "max_shard_gib=-1"], "above 0"),
        (["run.dir={run}", "to={run}"], "not empty"),
        (["run.dir={run}/none"], "cannot be read"),
    ],
)
def test_what_cannot_be_used_is_said(words, said, run_dir, capsys):
    assert run(*(word.replace("{run}", str(run_dir)) for word in words)) == ConfigError.exit_code
    assert said in capsys.readouterr().err


def test_a_damaged_checkpoint_is_refused(run_dir, capsys):
    file = next((run_dir / "checkpoints" / "step-000004").glob("*.safetensors"))
    whole = file.read_bytes()
    try:
        file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        assert run(f"run.dir={run_dir}", "checkpoint=4") == 64
        assert "does not have the bytes" in capsys.readouterr().err
    finally:
        file.write_bytes(whole)


def test_the_best_is_asked_of_the_newest_that_can_be_read(run_dir, tmp_path, capsys):
    file = run_dir / "checkpoints" / "step-000006" / "progress.json"
    whole = file.read_bytes()
    try:
        file.write_bytes(whole[:40])
        assert run(f"run.dir={run_dir}", "checkpoint=best", f"to={tmp_path / 'b'}") == 0
        shown = capsys.readouterr()
        assert "step-000006 progress.json has 40 bytes instead of" in shown.out and "the one before it" in shown.out
        assert f"exporting {run_dir / 'checkpoints' / 'step-000004'}" in shown.out
    finally:
        file.write_bytes(whole)


def test_without_room_nothing_is_written(run_dir, tmp_path, capsys, monkeypatch):
    class Full(durable.Disk):
        def free(self, path):
            return 2**20

    monkeypatch.setattr(durable, "disk", Full())
    assert run(f"run.dir={run_dir}", f"to={tmp_path / 'x'}", "merge=true") == 74
    assert f"No space left on {tmp_path}" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []

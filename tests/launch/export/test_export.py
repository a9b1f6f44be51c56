"""`shardtune export` on a run that has ended."""

import json
import os
import shutil
from pathlib import Path
from unittest.mock import patch

import pytest
from safetensors.torch import load_file

from launch.main import main
from strategies import atomic_io
from strategies.errors import ConfigError
from tests.helpers.models import tiny_model_dir
from tests.helpers.tokenizers import tiny_tokenizer, write_chat_data
from trainer.checkpoints import in_use
from trainer.model import quantised_checkpoints
from trainer.reporting.status import write_status

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """Six steps of LoRA with an evaluation after every second one, no export; checkpoints at steps 4 and 6."""
    folder = tmp_path_factory.mktemp("verb")
    model = tiny_model_dir(folder / "model", "llama", pad_token_id=2, hidden_size=64)  # 4 bits on any CPU
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
    assert run(run_dir, "--verify", "--json") == 0
    said = capsys.readouterr()
    model = str(run_dir / "export")
    assert json.loads(said.out) == {"run": str(run_dir), "checkpoints": ["step-000006"], "model": model}
    assert "export verified" in said.err and f"model: {model}" in said.err
    assert (run_dir / "export" / "adapter_model.safetensors").is_file()
    card = (run_dir / "export" / "README.md").read_text()
    assert "| eval/loss |" in card and "- steps: 6" in card and "base_model:" in card


def test_export_of_another_checkpoint_merged_into_another_directory(run_dir, tmp_path):
    assert (
        run(f"run.dir={run_dir}", "checkpoint=4", "merge=true", "dtype=bfloat16", f"to={tmp_path / 'm'}", "verify=true")
        == 0
    )
    whole = load_file(tmp_path / "m" / "model.safetensors")
    record = json.loads((run_dir / "run.json").read_text())
    assert record["base_parameters"] == sum(each.numel() for each in whole.values()) < record["sharding"]["parameters"]
    card = (tmp_path / "m" / "README.md").read_text()
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    losses = {row["step"]: f"{row['eval/loss']:.4f}" for row in rows if "eval/loss" in row}
    assert "- steps: 4" in card and f"| eval/loss | {losses[0]} | {losses[4]} |" in card, "not those of step 6"
    assert run(f"run.dir={run_dir}", "checkpoint=best", f"to={tmp_path / 'b'}") == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "run.dir: not set"),
        (["run.dir={run}", "chekpoint=4"], "did you mean checkpoint"),
        (["{run}", "run.dir={run}"], "name the directory of one run"),
        (["run.dir={run}", "to="], "needs a value"),
        (["run.dir={run}", "checkpoint=5"], "its checkpoints are 4, 6"),
        (["run.dir={run}", "merge=perhaps"], "true or false"),
        (["run.dir={run}", "merge=yes", "checkpoint=5"], "its checkpoints are 4, 6"),
        (["run.dir={run}", "dtype=int8"], "bfloat16"),
        (["run.dir={run}", "max_shard_gib=-1"], "above 0"),
        (["run.dir={run}", "to={run}"], "not empty"),
        (["run.dir={run}", "to={run}/run.json"], "run.json: is a file; name a directory"),
        (["run.dir={run}", "to={run}/run.json/model"], "run.json is a file; name a directory"),
        (["run.dir={run}/none"], "none: there is no such directory; name a run"),
        (["{run}/checkpoints"], "not a run directory"),
        (["adapters=[]", "to={run}/none"], "adapters=[]: names no adapter"),
    ],
)
def test_export_refuses_words_that_cannot_be_used(words, said, run_dir, capsys):
    assert run(*(word.replace("{run}", str(run_dir)) for word in words)) == ConfigError.exit_code
    assert said in capsys.readouterr().err


def test_a_damaged_checkpoint_is_refused(run_dir, capsys):
    file = next((run_dir / "checkpoints" / "step-000004").glob("*.safetensors"))
    whole = file.read_bytes()
    try:
        file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        assert run(f"run.dir={run_dir}", "checkpoint=4") == 64
        said = capsys.readouterr().err
        assert "does not have the bytes" in said and "checkpoint=<step> takes another one of [" in said
    finally:
        file.write_bytes(whole)


def test_export_best_is_decided_by_the_newest_readable_checkpoint(run_dir, tmp_path, capsys):
    file = run_dir / "checkpoints" / "step-000006" / "progress.json"
    whole, status = file.read_bytes(), (run_dir / "status.json").read_bytes()
    try:
        file.write_bytes(whole[:40])
        write_status(run_dir, "preempted", reason="stopped at step 6 of 9")
        assert run(f"run.dir={run_dir}", "checkpoint=best", f"to={tmp_path / 'b'}") == 0
        shown = capsys.readouterr()
        assert "step-000006 progress.json has 40 bytes instead of" in shown.out and "the one before it" in shown.out
        assert f"exporting {run_dir / 'checkpoints' / 'step-000004'}" in shown.out
        assert "the run is not done: stopped at step 6 of 9" in shown.out
    finally:
        file.write_bytes(whole)
        (run_dir / "status.json").write_bytes(status)


def test_export_best_that_is_no_better_than_the_base_is_reported(run_dir, tmp_path, capsys):
    file = run_dir / "metrics.jsonl"
    original = file.read_bytes()
    assert run(f"run.dir={run_dir}", "checkpoint=best", f"to={tmp_path / 'a'}") == 0
    assert "before the first step" not in capsys.readouterr().out
    rows = [json.loads(line) for line in original.splitlines()]
    rows[0]["eval/loss"] = 0.5
    assert rows[0]["step"] == 0
    try:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        assert run(f"run.dir={run_dir}", "checkpoint=best", f"to={tmp_path / 'b'}") == 0
        said = capsys.readouterr().out
        assert "no evaluation was better than the one before the first step (eval/loss 0.5000; step " in said
    finally:
        file.write_bytes(original)


def test_export_of_an_older_checkpoint_is_reported_and_an_unreadable_record_is_refused(run_dir, tmp_path, capsys):
    assert run(f"run.dir={run_dir}", "checkpoint=4", f"to={tmp_path / 'b'}") == 0
    assert f"to {tmp_path / 'b'}; the run ended at step 6" in capsys.readouterr().out
    file = run_dir / "run.json"
    whole = file.read_bytes()
    try:
        file.write_bytes(whole[:40])
        assert run(f"run.dir={run_dir}", f"to={tmp_path / 'c'}") == 64
        assert "run.json: cannot be read" in capsys.readouterr().err and not (tmp_path / "c").exists()
        file.write_text(json.dumps(json.loads(whole) | {"precision": "fp7"}))
        assert run(f"run.dir={run_dir}", f"to={tmp_path / 'c'}") == 64
        assert "run.json: its precision is fp7, which is none of auto, fp32" in capsys.readouterr().err
    finally:
        file.write_bytes(whole)


def test_export_without_room_writes_nothing(run_dir, tmp_path, capsys, monkeypatch):
    class Full(atomic_io.Disk):
        def free(self, path):
            return 2**20

    monkeypatch.setattr(atomic_io, "disk", Full())
    assert run(f"run.dir={run_dir}", f"to={tmp_path / 'x'}", "merge=true") == 74
    assert f"No space left on {tmp_path}" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_export_gguf_beside_a_merged_model(run_dir, tmp_path, capsys):
    script = tmp_path / "convert_hf_to_gguf.py"
    script.write_text("import sys\nsys.exit('a module is lacking')\n")
    words = ["gguf=q8_0", f"gguf.converter={script}", f"to={tmp_path / 'whole'}"]
    assert run(run_dir, "merge=true", *words) == 70
    assert "Mend the converter and repeat the command" in capsys.readouterr().err
    weights = tmp_path / "whole" / "model.safetensors"
    written = weights.stat().st_mtime_ns
    script.write_text("import sys\nopen(sys.argv[3], 'wb').write(b'GGUF')\n")
    assert run(run_dir, "merge=true", "dtype=float32", *words) == 64  # another export is not this one
    assert "exists and is not empty" in capsys.readouterr().err
    assert run(run_dir, "merge=true", *words) == 0  # the same command
    assert weights.stat().st_mtime_ns == written and not [*(tmp_path / "whole").glob(".waits*")]
    assert (tmp_path / "whole" / "gguf" / "run-q8_0.gguf").read_bytes() == b"GGUF"
    assert "ollama create run -f Modelfile" in capsys.readouterr().out
    for more, said in (
        (words, "merge the adapter with merge=true"),
        (["merge=true", "gguf=q2"], "must be one of f32"),
        (["merge=true", "gguf.python=python"], "goes with gguf=q8_0"),
    ):
        assert run(run_dir, *more) == 64
        assert said in capsys.readouterr().err


def test_export_of_a_checkpoint_that_the_run_deletes_takes_the_next(run_dir, tmp_path, capsys, monkeypatch):
    """As a run that trains does; a file that is not there is waited for only where its directory is."""
    copy = shutil.copytree(run_dir, tmp_path / "trains")
    checkpoints = copy / "checkpoints"
    newest, step = checkpoints / "step-000006", atomic_io.disk.open
    waited = []
    monkeypatch.setattr(atomic_io.disk, "sleep", waited.append)

    def open_and_prune(path, flags):
        if path.parent == newest and newest.exists():
            shutil.rmtree(newest)
        return step(path, flags)

    monkeypatch.setattr(atomic_io.disk, "open", open_and_prune)
    assert run(copy, f"to={tmp_path / 'out'}", "--json") == 0
    said = capsys.readouterr()
    assert (
        "checkpoint=auto: step-000006 was deleted meanwhile, since the run is still training; taking the next"
        in said.err
    )
    assert json.loads(said.out)["checkpoints"] == ["step-000004"] and waited == []
    # Deleted after it was looked at, before it was kept from that.
    shutil.copytree(run_dir / "checkpoints" / "step-000006", newest)
    monkeypatch.setattr(atomic_io.disk, "open", step)
    keep = in_use.marked_as_in_use

    def prune_and_keep(checkpoint):
        shutil.rmtree(newest, ignore_errors=True)
        return keep(checkpoint)

    monkeypatch.setattr(in_use, "marked_as_in_use", prune_and_keep)
    assert run(copy, f"to={tmp_path / 'again'}", "--json") == 0
    assert json.loads(capsys.readouterr().out)["checkpoints"] == ["step-000004"]


def test_export_of_a_quantised_model_reports_its_cost(run_dir, tmp_path, capsys):
    """The loss is computed once more by transformers, from labels, on the files as they lie there."""
    import torch
    from transformers import AutoModelForCausalLM

    from launch.config.compose import load_frozen_config
    from trainer.build.parts import prepare_data
    from trainer.model.loading import load_tokenizer

    to = tmp_path / "whole"
    assert run(run_dir, "merge=true", "bits=nf4", f"to={to}") == 0
    said = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("nf4:"))
    config = load_frozen_config(run_dir / "config.yaml")
    data = prepare_data(config, load_tokenizer(config.model)).evaluation
    losses = []
    for directory in (to, to / "nf4"):
        model, total, count = AutoModelForCausalLM.from_pretrained(directory), 0.0, 0
        for number in range(len(data)):
            sample = data.sample(number)
            ids = torch.tensor([sample.input_ids.tolist()])
            labels = torch.where(torch.tensor([sample.supervised.tolist()]) > 0, ids, -100)
            rows = int((labels[:, 1:] != -100).sum())
            with (
                torch.no_grad()
            ):  # as it is asked: with gradients bitsandbytes multiplies another way on some processors
                loss = float(model(ids, labels=labels).loss)
            total, count = total + loss * rows, count + rows
        losses.append(total / count)
    assert f"loss {losses[0]:.4f} -> {losses[1]:.4f}" in said and "on 4 held-out documents" in said
    assert losses[0] != losses[1]
    for card in (to / "README.md", to / "nf4" / "README.md"):
        assert f"loss {losses[0]:.4f} -> {losses[1]:.4f}" in card.read_text()
    with (
        patch("bitsandbytes.functional.has_avx512bf16", lambda: True),
        patch.object(quantised_checkpoints, "AVX512_COLUMNS_MULTIPLE", 128),
    ):
        assert run(run_dir, "merge=true", "bits=nf4", f"to={tmp_path / 'odd'}") == 64
    assert "bits=nf4: on a processor with avx512_bf16" in capsys.readouterr().err and not (tmp_path / "odd").exists()
    assert run(run_dir, "bits=nf4") == 64 and run(run_dir, "merge=true", "bits=3") == 64
    told = capsys.readouterr().err
    assert "merge the adapter with merge=true" in told and "must be one of nf4, int8" in told

"""`shardtune train --json`: one object at the end, whatever was said meanwhile."""

import json
import subprocess
from pathlib import Path

from tests.helpers.launching import command_here
from tests.helpers.models import tiny_model_dir
from tests.helpers.tokenizers import tiny_tokenizer, write_chat_data


def test_it_says_how_the_run_ended_and_nothing_else_on_stdout(tmp_path, capfd, monkeypatch):
    tiny_tokenizer().save_pretrained(tiny_model_dir(tmp_path / "model"))
    data, run = write_chat_data(tmp_path / "train.jsonl", 16), tmp_path / "run"
    words = [f"model.path={tmp_path / 'model'}", f"data.path={data}", f"data.cache_dir={tmp_path / 'cache'}"]
    words += ["budget.steps=2", "batch.global=4", "batch.micro=2", "run.device=cpu", f"run.dir={run}"]
    words += ["logging.wandb=disabled", "logging.report=false"]
    capfd.readouterr()  # what libraries said when the model was made
    assert command_here(["train", *words, "--json"]) == 0
    said = capfd.readouterr()
    told = json.loads(said.out)
    checkpoint = told.pop("checkpoint")
    assert told == {
        "run": str(run),
        "by": None,
        "state": "done",
        "why": None,
        "step": 2,
        "exit_code": 0,
        "record": str(run / "run.json"),
        "export": str(run / "export"),
    }
    assert checkpoint["step"] == 2 and Path(checkpoint["path"]).is_dir()
    assert "step 2/2" in said.err

    # What is already done is told in the same form, and what a process of ours prints is no part of it.
    monkeypatch.setattr("launch.train.launch", lambda *_: subprocess.run(["echo", "a rank prints"]).returncode)
    assert command_here(["train", *words, "--json"]) == 0
    said = capfd.readouterr()
    assert json.loads(said.out)["state"] == "done" and "a rank prints" in said.err


def test_of_several_runs_or_none_it_names_the_way(capfd):
    for flag in ("-m", "--dry-run", "--cfg"):
        assert command_here(["train", flag, "--json"]) == 64
        assert "--json: is of one run; of runs by -m: shardtune compare" in capfd.readouterr().err

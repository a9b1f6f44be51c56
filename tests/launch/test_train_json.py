"""`shardtune train --json`: one object at the end, whatever was said meanwhile."""

import json
import subprocess
from pathlib import Path
from unittest.mock import Mock

from tests.helpers.launching import command_here
from tests.helpers.models import tiny_model_dir
from tests.helpers.tokenizers import tiny_tokenizer, write_chat_data


def test_train_json_reports_how_the_run_ended_and_nothing_else_on_stdout(tmp_path, capfd, monkeypatch):
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
    monkeypatch.setattr("launch.train.launch_run", lambda *_: subprocess.run(["echo", "a rank prints"]).returncode)
    assert command_here(["train", *words, "--json"]) == 0
    said = capfd.readouterr()
    assert json.loads(said.out)["state"] == "done" and "a rank prints" in said.err


def test_train_json_of_several_runs_or_a_configuration_names_the_way(capfd):
    for flag in ("-m", "--cfg"):
        assert command_here(["train", flag, "--json"]) == 64
        said = capfd.readouterr()
        assert f"--json: works for a single run; leave {flag} out" in said.err
        assert json.loads(said.out)["exit_code"] == 64


def test_json_error_is_an_object_with_its_exit_code(tmp_path, capfd, monkeypatch):
    cases = {
        ("train", "optim.lrr=1", "model.path=m"): (64, "did you mean optim.lr?"),
        ("status", str(tmp_path / "gone")): (64, "gone"),
        ("export", str(tmp_path / "gone")): (64, "there is no such directory"),
        ("trian",): (64, "did you mean train?"),
    }
    for words, (code, said) in cases.items():
        assert command_here([*words, "--json"]) == code
        answer = json.loads(capfd.readouterr().out)
        assert answer["exit_code"] == code
        assert said in answer["error"]
        assert "\n".join(answer["problems"]) == answer["error"]
    assert command_here(["status", str(tmp_path / "gone")]) == 64
    assert capfd.readouterr().out == "", "without --json there is none"
    with monkeypatch.context() as left_over:
        left_over.setenv("RANK", "x")
        assert command_here(["train", "model.path=m", "--json"]) == 64
        assert "RANK=x: no whole number" in json.loads(capfd.readouterr().out)["error"]
    for error, code in ((RuntimeError("broken"), 70), (KeyboardInterrupt(), 130)):
        monkeypatch.setattr("launch.runs.status_command.read_arguments", Mock(side_effect=error))
        assert command_here(["status", "--json", "--watch"]) == code
        line = capfd.readouterr().out
        assert json.loads(line)["exit_code"] == code
        assert line.count("\n") == 1, "with --watch an object is a line"


def test_train_json_of_a_dry_run_and_of_a_defect_in_its_step(tmp_path, capfd, monkeypatch):
    tiny_tokenizer().save_pretrained(tiny_model_dir(tmp_path / "model"))
    data = write_chat_data(tmp_path / "train.jsonl", 16)
    words = [f"model.path={tmp_path / 'model'}", f"data.path={data}", f"data.cache_dir={tmp_path / 'cache'}"]
    words += ["budget.steps=2", "batch.global=4", "batch.micro=2", "run.device=cpu", f"run.dir={tmp_path / 'run'}"]
    capfd.readouterr()
    assert command_here(["train", *words, "--dry-run", "--json"]) == 0
    answer = json.loads(capfd.readouterr().out)
    assert (answer["steps"], answer["batch"]) == (2, {"global": 4, "micro": 2, "accumulation": 2})
    assert answer["memory_per_rank"]["bytes"] >= sum(answer["memory_per_rank"]["kinds"].values()) > 0
    for error, code in ((NotImplementedError("no such operation"), 0), (KeyError("reference_logps"), 70)):
        monkeypatch.setattr("launch.plan.dry_run_memory.simulate_depth", Mock(side_effect=error))
        assert command_here(["train", *words, "--dry-run"]) == code
        said = capfd.readouterr().out
        assert "memory per rank: " in said and "nothing was trained" in said
        assert ("a fault of shardtune" in said) == bool(code)


def test_a_run_that_never_began_names_no_report(pages_of_runs, tmp_path, capfd):
    tiny_tokenizer().save_pretrained(tiny_model_dir(tmp_path / "model"))
    words = [f"model.path={tmp_path / 'model'}", f"data.path={tmp_path / 'torn.jsonl'}", "budget.steps=2"]
    (tmp_path / "torn.jsonl").write_text("{torn\n")
    words += ["batch.global=4", "run.device=cpu", f"data.cache_dir={tmp_path / 'cache'}", f"run.dir={tmp_path / 'run'}"]
    assert command_here(["train", *words, "logging.wandb=disabled"]) == 65
    assert "report:" not in capfd.readouterr().out
    assert not (tmp_path / "run" / "report.html").exists()

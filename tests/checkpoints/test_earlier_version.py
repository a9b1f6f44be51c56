"""Run directories that an earlier version wrote: each verb reads them, and a stopped run goes on with `run.accept=[code]`.

`tests/golden/earlier_version.tar.gz` holds a tiny model, its data, the prepared data, and three runs of version 0.1.0 as of
revision c043f22: `finished` (LoRA, exported), `classifier` (all weights, not exported) and `stopped` (LoRA, by SIGTERM in its
first steps of 12). The archive is never made anew by a later version: that is what it is for.
"""

import json
import tarfile
from pathlib import Path

import pytest
import yaml

from launch.config.compose import compose_config
from launch.config.frozen import load_frozen_config, rewrite_config_with_own_choices
from launch.runs.freeze import write_run_config
from strategies.matmul import Matmul
from tests.helpers.launching import command_here
from trainer.config.run import MICRO_BATCH_KEY, settled_matmul
from trainer.reporting.file_version import FILE_VERSION
from trainer.reporting.resolution import OutOfMemoryTrial, ResolvedSetting
from trainer.reporting.run_record import read_run_record

ARCHIVE = Path(__file__).parents[1] / "golden" / "earlier_version.tar.gz"
SAME_WORDS = [
    "model.path=model",
    "budget.steps=12",
    "batch.global=4",
    "batch.micro=2",
    "run.device=cpu",
    "precision=fp32",
    "logging.wandb=disabled",
    "data.cache_dir=cache",
    "data.path=chat.jsonl",
    "data.eval_path=held.jsonl",
    "tuning=lora",
    "tuning.rank=2",
    "run.dir=runs/stopped",
    "checkpoint.keep=1",
]


@pytest.fixture
def site(tmp_path, monkeypatch):
    """The working directory of those runs, as it was left."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_earlier_version_stopped_run_resumes_once_the_new_code_is_accepted(site, capsys):
    assert command_here(["train", *SAME_WORDS]) == 64
    refusal = capsys.readouterr().err
    # Of a default that changed it says that the run keeps its own.
    assert "keeps the defaults that it began with: evaluation.every_steps: 0 there, auto here" in refusal
    problems = [line for line in refusal.splitlines() if "keeps the defaults" not in line]
    differences = [line.strip() for line in problems if " there, " in line]
    # The libraries of this machine may be others than those that wrote the archive.
    assert {line.partition(":")[0] for line in differences} <= {"code", "versions"}, refusal

    # A setting that the earlier version did not know counts as its default: another value is another base.
    (checkpoint,) = (site / "runs/stopped/checkpoints").glob("step-*")
    changed = ["model.rope.theta=20000", "run.accept=[code,versions]", f"run.resume={checkpoint}", "run.dir=runs/theta"]
    assert command_here(["train", *SAME_WORDS, *changed]) == 64
    assert "base: model.rope.theta: None there, 20000.0 here" in capsys.readouterr().err

    assert command_here(["train", *SAME_WORDS, "run.accept=[code,versions]"]) == 0, capsys.readouterr().err
    rows = [json.loads(line) for line in (site / "runs/stopped/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 13))
    assert (site / "runs/stopped/export/adapter_model.safetensors").exists()
    # Files that are written whole have the version of today; rows go on in the file that has none.
    assert read_run_record(site / "runs/stopped").version == FILE_VERSION
    assert not any("version" in row for row in rows)


def test_earlier_version_run_may_share_its_rows_among_ranks(site, capsys):
    """Its files do not have `parallel`, which counts as its default, and is free to change."""
    assert "\nparallel:" not in (site / "runs/stopped/config.yaml").read_text()
    words = [*SAME_WORDS, "strategy=fsdp2", "launcher.processes=2", "parallel.sequence=2"]
    run_dir = write_run_config(compose_config(words), site / "runs/stopped", may_change_strategy=True)
    assert "parallel.sequence: 1 there, 2 here" in capsys.readouterr().err
    assert load_frozen_config(run_dir / "config.yaml").parallel.sequence == 2


def test_earlier_version_run_directories_are_read_by_every_verb(site, capsys):
    assert command_here(["status", "runs", "--json"]) == 0
    states = {Path(run["directory"]).name: run["state"] for run in json.loads(capsys.readouterr().out)["runs"]}
    assert states == {"finished": "done", "classifier": "done", "stopped": "preempted"}

    assert command_here(["compare", "runs/finished", "runs/stopped", "to=compared"]) == 0
    compared = json.loads((site / "compared/compare.json").read_text())
    assert compared["version"] == FILE_VERSION
    for name in ("finished", "classifier", "stopped"):
        assert read_run_record(site / "runs" / name).version == 0
    assert command_here(["export", "runs/classifier", "to=exports/classifier"]) == 0
    exported = json.loads((site / "exports/classifier/config.json").read_text())
    assert exported["id2label"] == {"0": "neg", "1": "pos"}

    task = ["evaluation.tasks.held.kind=loss", "evaluation.tasks.held.path=held.jsonl"]
    assert command_here(["evaluate", "runs/finished", *task]) == 0
    assert "held" in json.loads((site / "runs/finished/evaluation.json").read_text())["tasks"]


def test_earlier_version_relative_base_is_explained_from_another_directory(site, monkeypatch, capsys):
    """`model.path=model` is looked up from where the verb is typed, and the training was started elsewhere."""
    elsewhere = site / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert command_here(["export", str(site / "runs/finished"), "to=exported"]) == 64
    said = capsys.readouterr().err
    assert f"not a model directory in {elsewhere}" in said and "relative to where its training was started" in said
    monkeypatch.chdir(site)
    assert command_here(["export", "runs/finished", "to=exported"]) == 0


def test_earlier_version_choices_written_as_sentences_are_read(site):
    """As its launcher left `config.yaml` after memory ran out in step 3, and its rank 0 after it had chosen a library."""
    path = site / "runs/stopped/config.yaml"
    text = path.read_text()
    assert text.count("  micro: 2\n") == 1 and text.endswith("  launcher.processes: auto -> 1\n")
    text = text.replace("  micro: 2\n", "  micro: 1\n")
    text += "  batch.micro: 2 -> 1 (2 ran out of memory at step 3)\n  run.matmul: auto -> blas (as this run began)\n"
    path.write_text(text)
    config = load_frozen_config(path)  # which checks that it is still the run of 2 that was asked for
    assert config.resolution(MICRO_BATCH_KEY) == ResolvedSetting(
        MICRO_BATCH_KEY, 2, 1, "", (OutOfMemoryTrial(2, step=3),)
    )
    assert settled_matmul(config) is Matmul.blas
    # Written again, it has the fields, and is still the same run.
    rewrite_config_with_own_choices(path.parent, config)
    assert yaml.safe_load(path.read_text())["substitutions"]["run.matmul"]["chosen"] == "blas"
    assert load_frozen_config(path) == config

"""An interrupted run goes on, and as before: with its library of float32 products, whatever became of its rows."""

import json

import pytest

from launch.compare.settings import write_comparison_file
from launch.config.frozen import load_frozen_config
from strategies import matmul
from strategies import runtime as processes
from strategies.matmul import Matmul
from tests.helpers.building import model_dir
from tests.helpers.launching import command_here
from tests.helpers.tokenizers import write_chat_data
from trainer.reporting.jsonl import UNREADABLE_LINES_FILE, JsonlTracker

ZEN5, UNKNOWN = matmul.MEASURED_RATIOS[0].processor, matmul.Processor("GenuineIntel", 6, "AVX2", "mkl")
NOTE = "auto -> onednn (oneDNN is 2.2 times as fast on AMD Zen 5)"


@pytest.fixture
def root(tmp_path):
    model_dir(tmp_path)
    write_chat_data(tmp_path / "train.jsonl", 24)
    return tmp_path


@pytest.fixture
def libraries(monkeypatch):
    """The libraries that processes took, in order."""
    choices = []

    def choose(asked):
        choices.append(matmul.choose_matmul_library(asked))
        return choices[-1]

    monkeypatch.setattr(processes, "choose_matmul_library", choose)
    return choices


def on(monkeypatch, processor, *, keeps_float32=True):
    monkeypatch.setattr(matmul, "this_processor", lambda: processor)
    monkeypatch.setattr(matmul, "_onednn_keeps_float32", lambda: keeps_float32)


def train(root, run_dir, *words):
    settings = {
        "model.path": root / "llama",
        "data.path": root / "train.jsonl",
        "data.cache_dir": root / "cache",
        "run.device": "cpu",
        "run.threads": 1,
        "launcher.processes": 1,
        "batch.global": 4,
        "batch.micro": 4,
        "budget.steps": 5,
        "optim.lr": 1e-3,
        "checkpoint.every_steps": 2,
        "logging.every_steps": 1,
        "logging.wandb": "disabled",
        "export.at_end": "false",
    }
    return command_here(["train", f"run.dir={run_dir}", *(f"{k}={v}" for k, v in settings.items()), *words])


def losses(run_dir):
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows if "loss" in row]


def noted(run_dir):
    """The note in `config.yaml`, and what `run.json` says of the last start."""
    in_record = json.loads((run_dir / "run.json").read_text())["substitutions"].get("run.matmul")
    resolution = load_frozen_config(run_dir / "config.yaml").resolution("run.matmul")
    return None if resolution is None else str(resolution), in_record


def test_matmul_library_of_the_first_start_is_kept_by_the_run(root, tmp_path, monkeypatch, libraries, capfd):
    """Its rows are those of a run that was left alone, also where a line of the file was damaged meanwhile.

    It failed one step after a checkpoint was begun beside training, which is not lost.
    """
    on(monkeypatch, ZEN5)
    calm, cut = tmp_path / "calm", tmp_path / "cut"
    assert train(root, calm) == 0
    assert noted(calm) == (NOTE, NOTE)
    log = JsonlTracker.log

    def fail_at_step_3(tracker, metrics, *, step):
        if step == 3:  # the checkpoint of step 2 is being written beside training
            raise OSError(28, "No space left on device")
        log(tracker, metrics, step=step)

    with monkeypatch.context() as patch:
        patch.setattr(JsonlTracker, "log", fail_at_step_3)
        assert train(root, cut) == 74

    with (cut / "metrics.jsonl").open("ab") as file:
        file.write(b"\xe9\n[1]\n" + b"[" * 100_000 + b'\n{"step"')
    assert command_here(["status", str(cut)]) == 0
    assert command_here(["compare", str(calm), str(cut)]) == 0
    on(monkeypatch, UNKNOWN)  # another host, where a new run would take BLAS
    libraries.clear()
    capfd.readouterr()
    assert train(root, cut) == 0
    said = capfd.readouterr().out
    assert "is not UTF-8" in said
    assert "checkpoint step-000002: all of it was written when the run ended; it is published now" in said
    assert "resumed from step-000002" in said
    assert len((cut / UNREADABLE_LINES_FILE).read_text().splitlines()) == 3
    assert libraries[-1].library is Matmul.onednn
    assert noted(cut) == (NOTE, NOTE)
    assert losses(cut) == losses(calm)

    libraries.clear()
    held_out = [f"evaluation.tasks.own.path={root / 'train.jsonl'}", "evaluation.tasks.own.kind=loss"]
    assert command_here(["evaluate", str(cut), *held_out, "run.device=cpu"]) == 0
    assert command_here(["export", str(cut), f"to={tmp_path / 'out'}"]) == 0
    assert {choice.library for choice in libraries} == {Matmul.onednn}


def test_matmul_library_that_a_host_cannot_keep_is_replaced_by_blas_and_reported(
    root, tmp_path, monkeypatch, libraries, capfd
):
    """Then a word of the user's, which any start takes; left out at the next start, it is kept."""
    run = tmp_path / "run"
    on(monkeypatch, ZEN5)
    assert train(root, run) == 0
    (run / "status.json").unlink()  # as of a run that was cut off after its last checkpoint
    on(monkeypatch, ZEN5, keeps_float32=False)
    capfd.readouterr()
    assert train(root, run) == 0
    reason = "auto -> blas (this run began with onednn; oneDNN would round float32 products to bfloat16 here)"
    assert libraries[-1].library is Matmul.blas
    assert noted(run) == (NOTE, reason)
    assert f"resolved: run.matmul: {reason}" in " ".join(capfd.readouterr().out.split())

    on(monkeypatch, ZEN5)
    for words, library, note in (
        (["run.matmul=blas"], Matmul.blas, None),
        ([], Matmul.blas, "auto -> blas (as this run began)"),
    ):
        (run / "status.json").unlink()
        assert train(root, run, *words) == 0
        assert libraries[-1].library is library
        assert noted(run)[1] == note


def test_matmul_library_is_one_for_the_points_of_a_comparison(root, tmp_path, monkeypatch, libraries, capfd):
    """The first point to start decides for those that other hosts start later."""
    points = tmp_path / "points"
    points.mkdir()
    write_comparison_file(points, [], [])
    for name, processor in (("first", ZEN5), ("second", UNKNOWN)):
        on(monkeypatch, processor)
        assert train(root, points / name, "budget.steps=1") == 0
        assert noted(points / name)[0] == NOTE
        assert libraries[-1].library is Matmul.onednn
    (points / "run.matmul.json").write_text("[]")
    assert train(root, points / "third", "budget.steps=1") == 74
    assert "run.matmul.json: does not say" in capfd.readouterr().err

"""shardtune as a module: composing, a run in processes of its own, what it left, and packages of the same names."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import shardtune
from strategies.errors import ConfigError
from tests.helpers.building import model_dir
from tests.helpers.launching import ROOT, clean_environment
from tests.helpers.speed import seconds
from tests.helpers.tokenizers import write_chat_data
from tests.helpers.warm import forked, heard


def test_a_directory_may_be_typed_as_text(tmp_path):
    (tmp_path / "status.json").write_text('{"state": "done"}')
    assert shardtune.Run(str(tmp_path)).status == {"state": "done"}


def test_keywords_are_the_words_of_the_command_line():
    config = shardtune.compose(
        "optim.lr=1e-3",
        check=False,
        model_path="it's [x].d",
        data_path=["a b.jsonl", 'say "c".jsonl'],
        data_columns={"prompt": "q"},
        data_eval_path=None,
        tuning="lora",
        tuning_modules_to_save=["score"],
        data_packing=True,
        **{"batch.global": 64, "data.learn.turns": "last"},
    ).config
    assert (config.model.path, config.data.path, config.data.eval_path) == (
        "it's [x].d",
        ["a b.jsonl", 'say "c".jsonl'],
        None,
    )
    assert (config.data.columns, config.data.packing, config.batch["global"]) == ({"prompt": "q"}, True, 64)
    assert (config.optim.lr, config.tuning.modules_to_save, str(config.data.learn.turns.value)) == (
        1e-3,
        ["score"],
        "last",
    )
    for path in ("[x]", "null", "{a: b}", "'q'"):
        assert shardtune.compose(check=False, model_path=path).config.model.path == path
    with pytest.raises(ConfigError, match=r"did you mean model\.path\?"):
        shardtune.compose(check=False, model_pth="x")
    with pytest.raises(ConfigError, match=r"learning_rate=0.0002: here it is optim.lr=0.0002"):
        shardtune.compose(check=False, learning_rate=2e-4)


class Warm:
    """As `subprocess.Popen` of what `shardtune` starts, forked."""

    def __init__(self, command, env, stdout, **_):
        python, safe_path, unbuffered, *words = command
        assert (safe_path, unbuffered) == ("-P", "-u")
        if stdout is None:
            self.process, self.stdout = heard([python, *words], env, cwd=Path.cwd())
        else:
            reads, writes = os.pipe()
            self.process = forked([python, *words], env, stdout.fileno(), errors=writes, cwd=Path.cwd())
            os.close(writes)
            self.stdout = self.stderr = os.fdopen(reads)
        self.wait = self.process.wait

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stdout.close()


def test_python_api_runs_and_reads_what_the_run_left(tmp_path, monkeypatch, capsys):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for key, value in clean_environment().items():
        monkeypatch.setenv(key, value)
    (tmp_path / "trainer.py").write_text("raise ImportError('this file is the user\\'s')")  # where the notebook is
    monkeypatch.chdir(tmp_path)
    model_dir(tmp_path)
    write_chat_data(tmp_path / "train.jsonl", 24)
    asked = {
        "model_path": tmp_path / "llama",
        "data_path": "train.jsonl",
        "data.cache_dir": "cache",
        "run_device": "cpu",
    }
    asked |= {"batch.global": 8, "batch.micro": 4, "budget_steps": 2, "logging_wandb": "disabled", "run_dir": "first"}
    asked |= {"logging_report": False}
    run = shardtune.train(tuning="lora", **asked)
    assert run.dir == tmp_path / "first" and run.status["state"] == "done"
    assert "step 2/2" in capsys.readouterr().out
    steps = run.metrics()
    assert list(steps[steps.loss.notna()].step) == [1, 2]
    model = run.model()
    assert type(model).__name__.startswith("Peft") and not model.training
    assert run.tokenizer().vocab_size
    # What starts has been seen to start.
    monkeypatch.setattr(shardtune, "subprocess", SimpleNamespace(Popen=Warm, PIPE=None, STDOUT=None))
    assert (run.export("merged", merge=True) / "model.safetensors").exists()
    _check_results(tmp_path, run)
    with pytest.raises(shardtune.RunFailed) as failed:
        shardtune.train(tuning="lora", **asked | {"optim_lr": 1e-3})
    assert failed.value.code == 64 and failed.value.run == run


def _check_results(tmp_path, run):
    """Evaluate and compare the run that was trained, and plan one of its model."""
    task = {"evaluation.tasks.facts.kind": "loss", "evaluation.tasks.facts.path": "train.jsonl"}
    measured = shardtune.evaluate(run, to="measured", against="base", run_device="cpu", **task)
    assert measured.directory == tmp_path / "measured" and measured.page.is_file()
    loss = measured.metrics().set_index("metric").loc["loss"]
    assert loss.difference == pytest.approx(loss.value - loss.other) and loss.verdict
    assert set(measured.rows().arm) == {"base", "tuned"}
    assert list(shardtune.compare(run).runs()["steps"]) == [2]
    plan = {"hardware": "a10g", "strategy": "ddp", "strategy.activation_checkpointing": "none", "batch_micro": 1}
    expected = shardtune.plan(model_path=tmp_path / "llama", plan_workers=1, **plan)
    assert expected.fits and "strategy=ddp" in expected.settings and len(expected.options()) == 1
    with pytest.raises(shardtune.RunFailed, match=r"there is no such card") as failed:
        shardtune.plan(model_path=tmp_path / "llama", hardware="h900")
    assert (failed.value.code, failed.value.run) == (64, None)
    with pytest.raises(ConfigError, match=r"nothing to compare"):
        shardtune.compare(model_path=tmp_path / "llama", data_path="train.jsonl", strategy=["ddp"])
    with pytest.raises(ConfigError, match=r"there is no such directory"):
        shardtune.evaluate("nowhere")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"strategy": ["ddp", "fsdp2"], "optim_lr": [1e-4, 2e-4]}, ["strategy=ddp,fsdp2", "optim.lr=0.0001,0.0002"]),
        ({"data_path": ["a,b.jsonl", "c"]}, ['data.path=["a,b.jsonl","c"]']),
        ({"model_path": ["a,b", "c"]}, ['model.path="a,b",c']),
        ({"tuning_targets": [["q_proj", "v_proj"], ["q_proj"]]}, ['tuning.targets=["q_proj","v_proj"],["q_proj"]']),
        (
            {"compare_steps": 20, "compare_skip": ["strategy=ddp"]},
            ["compare.steps=20", 'compare.skip=["strategy=ddp"]'],
        ),
        ({"evaluation_tasks": ["loss"], "from_": "runs/x"}, ['evaluation.tasks=["loss"]', "from=runs/x"]),
    ],
)
def test_lists_are_axes_where_a_setting_takes_one_value(settings, words):
    assert shardtune._command_arguments((), settings, axes=True) == words


def test_python_packages_of_the_same_names_are_named_in_the_first_line(tmp_path):
    (tmp_path / "trainer").mkdir()
    (tmp_path / "trainer" / "__init__.py").touch()
    env = clean_environment(PYTHONPATH=f"{tmp_path}:{ROOT}")
    for command in (["-P", "-m", "shardtune", "--version"], ["-P", "-c", "import shardtune; shardtune.compose()"]):
        done = subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True, timeout=seconds(60))
        said = done.stderr.strip().splitlines()[0 if "-m" in command else -1]
        assert (
            done.returncode
            and f"another package trainer hides shardtune's: {tmp_path / 'trainer'} comes before" in said
        )
        assert "virtual environment of its own" in said

"""Mistakes that users make: each ends with one screen of message and its exit code, and leaves nothing half-done."""

import json
import re
import shutil
import sys

import pytest

from launch.main import main
from tests.helpers.building import model_dir
from tests.helpers.launching import ROOT, clean_environment
from tests.helpers.speed import seconds
from tests.helpers.tokenizers import write_chat_data, write_jsonl
from tests.helpers.warm import forked


def bad_models(path):
    """Directories like that of the good model, each with one thing wrong."""
    config = json.loads((path / "llama" / "config.json").read_text())
    weights = (path / "llama" / "model.safetensors").read_bytes()
    files = {
        "lfs": {"model.safetensors": b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 12\n"},
        "cut": {"model.safetensors": weights[:5000]},
        "adapter": {"config.json": None, "model.safetensors": None, "adapter_config.json": b'{"peft_type": "LORA"}'},
        "speechless": {name.name: None for name in (path / "llama").glob("*token*")},
        "tokenizer-lfs": {"tokenizer.json": b"version https://git-lfs.github.com/spec/v1\n"},
        "unknown": {"config.json": json.dumps(config | {"model_type": "llama9"}).encode()},
        "misfit": {"config.json": json.dumps(config | {"hidden_size": "many"}).encode()},
        "headless": {"config.json": json.dumps(config | {"num_attention_heads": 0}).encode()},
        "negative": {"config.json": json.dumps(config | {"num_hidden_layers": -2}).encode()},
        "torn": {"config.json": b'{"model_type": "llama",'},
        "narrow": {"config.json": json.dumps(config | {"max_position_embeddings": 16}).encode()},
        "shaped": {"config.json": json.dumps(config | {"rope_scaling": {"type": "x", "factor": 2.0}}).encode()},
        "endless": {"tokenizer.json": tokenizer_without_end(path / "llama")},
        "reformer": {"config.json": json.dumps(REFORMER).encode()},
    }
    for name, changes in files.items():
        shutil.copytree(path / "llama", path / name)
        for file, content in changes.items():
            (path / name / file).unlink(missing_ok=True)
            if content is not None:
                (path / name / file).write_bytes(content)


def tokenizer_without_end(model):
    """The tokenizer of a model with a pattern that tries every way to split a text, which ends in a panic of Rust."""
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    pattern = {"Regex": "(\\w*\\s*\\w*)*$(?!a)x"}
    tokenizer["pre_tokenizer"] = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    return json.dumps(tokenizer).encode()


REFORMER = {"model_type": "reformer", "is_decoder": True, "vocab_size": 352, "num_buckets": 4, "eos_token_id": 1}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    path = tmp_path_factory.mktemp("bad")
    model_dir(path)
    write_chat_data(path / "good.jsonl", 24)
    (path / "torn.jsonl").write_text((path / "good.jsonl").read_text() + '{"messages": [{"role": "user"\n')
    bad_models(path)
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


OF_RUST = re.compile(r"thread '|Onig: |stack backtrace|note: |\s+(\d+:|at) ")
"""Lines that a panic itself writes, with its trace if RUST_BACKTRACE asks for it."""
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
    "no such hub model": (
        {"model__path": "nobody/nothing"},
        64,
        ["nobody/nothing: not a model directory in /", "set model.download=true"],
    ),
    "unmatched target": ({"tuning": "lora", "tuning__targets": "[q_prj]"}, 64, ["q_prj", "q_proj", "all-linear"]),
    "nothing supervised": (
        {"data__path": "{root}/short.jsonl", "data__max_length": 32},
        65,
        ["supervised", "data.max_length"],
    ),
    "single with two processes": ({"launcher__processes": 2}, 64, ["strategy=single", "launcher.processes"]),
    "weights left to git-lfs": ({"model__path": "{root}/lfs"}, 64, ["git lfs pull", "model.safetensors"]),
    "weights cut off": ({"model__path": "{root}/cut"}, 64, ["is no whole safetensors file", "download it again"]),
    "adapter": ({"model__path": "{root}/adapter"}, 64, ["is an adapter", "tuning.from", "model.adapters"]),
    "no tokenizer": ({"model__path": "{root}/speechless"}, 64, ["holds no tokenizer", "model.tokenizer="]),
    "tokenizer left to git-lfs": (
        {"model__path": "{root}/tokenizer-lfs"},
        64,
        ["tokenizer.json: is a pointer", "git lfs pull"],
    ),
    "unknown model": ({"model__path": "{root}/unknown"}, 64, ["'llama9'", "install a newer transformers"]),
    "no attention heads": ({"model__path": "{root}/headless"}, 64, ["config.json cannot be read", "by zero", "mend"]),
    "negative size": ({"model__path": "{root}/negative"}, 64, ["config.json has num_hidden_layers=-2", "at least 1"]),
    "value of the wrong type": ({"model__path": "{root}/misfit"}, 64, ["config.json cannot be read", "'hidden_size'"]),
    "torn config.json": (
        {"model__path": "{root}/torn"},
        64,
        ["torn/config.json: is not valid JSON", "again"],
    ),
    "unknown rope": ({"model__path": "{root}/shaped"}, 64, ["config.json names 'x', which this transformers"]),
    "tokenizer that panics": (
        {"model__path": "{root}/endless"},
        64,
        ["endless: its tokenizer.json makes the tokenizers library fail", "model.tokenizer"],
    ),
    "documents longer than positions": ({"model__path": "{root}/narrow"}, 64, ["16", "data.max_length"]),
    "model that cannot train": ({"model__path": "{root}/reformer"}, 64, ["a reformer trains only on rows of"]),
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
    assert len([line for line in shown.splitlines() if not OF_RUST.match(line)]) < 25
    assert not list((root / "run").glob("checkpoints/*"))


def test_full_disk_at_checkpoint_time(tmp_path, root):
    """No file may grow beyond 60 kB in that process: the state cannot be written, everything else can."""
    run, said = tmp_path / "run", tmp_path / "said"
    command = words(root, run__dir=run, budget__steps=6, checkpoint__every_steps=2)
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))\n"
    )
    env = clean_environment(PYTHONPATH=f"{tmp_path / 'site'}:{ROOT}")
    with said.open("w") as out:
        process = forked([sys.executable, "-m", "launch.main", *command], env, out.fileno())
    assert process.wait(seconds(120)) == 74, said.read_text()
    assert "checkpoint" in said.read_text() and "free space" in said.read_text()
    assert list((run / "checkpoints").iterdir()) == []
    assert json.loads((run / "status.json").read_text())["state"] == "failed"
    # With room again, the same command runs to the end.
    assert main(command) == 0
    assert [p.name for p in sorted((run / "checkpoints").iterdir())] == ["step-000004", "step-000006"]

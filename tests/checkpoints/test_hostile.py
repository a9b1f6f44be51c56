"""Somebody else's checkpoints, from end to end: what they bring along never runs, whichever command meets them."""

import hashlib
import json
import os
import pickle
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from launch.config.frozen import _identifying_settings, _settings_sha256, load_frozen_config
from launch.main import main
from strategies.atomic_io import WrittenFile
from tests.helpers.building import model_dir
from tests.helpers.tokenizers import write_chat_data
from trainer.checkpoints.manifest import write_manifest
from trainer.data.tokens import template_limits
from trainer.reporting.status import RunState, record_failure, write_status


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
        write_manifest(
            step, [WrittenFile(p.name, p.stat().st_size, hashlib.sha256(p.read_bytes()).hexdigest()) for p in files]
        )

    return plant


PLANTED = {
    "early": (as_early_versions_wrote, "early version"),
    "index.json": (as_now("index.json"), "index.json"),
    "progress.json": (as_now("progress.json"), "progress.json"),
    "tensors": (as_now("rank-00000.safetensors"), "cannot be read"),
    ".metadata": (as_now(".metadata"), "damaged manifest"),
}


@pytest.mark.parametrize("where", PLANTED)
def test_checkpoint_pickle_is_never_read(root, tmp_path, where, capfd):
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


def with_config(root: Path, to: Path, change) -> Path:
    """Their run with another config.yaml, whose hash fits, as somebody who means harm would write it."""
    shutil.copytree(root / "theirs", to)
    head, body = (to / "config.yaml").read_text().split("# overrides", 1)
    overrides, text = body.split("\n", 1)
    text = change(text)
    tree = _identifying_settings(OmegaConf.to_container(OmegaConf.create(text))) if "*" not in text else {}
    head = f"# Frozen by shardtune; do not edit.\n# sha256: {_settings_sha256(tree)}\n"
    (to / "config.yaml").write_text(f"{head}# overrides{overrides}\n{text}")
    return to


def test_hostile_configuration_resolves_no_interpolation_and_expands_no_alias(root, tmp_path, capfd, monkeypatch):
    """Aliases would be gigabytes of values; an interpolation would carry a secret of the reader into what is exported."""
    monkeypatch.setenv("OF_THE_READER", "not-to-be-told")
    lines = ["a: &a [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]" for a, b in pairwise("abcdefghij")]
    bomb = with_config(root, tmp_path / "bomb", lambda text: text + "\n".join(lines) + "\n")
    for way in (["export", str(bomb), f"to={tmp_path / 'out'}"], ["compare", str(bomb), str(root / "theirs")]):
        assert main(way) == 64
        assert "YAML aliases" in capfd.readouterr().err
    assert main(["status", str(bomb)]) == 0
    large = with_config(root, tmp_path / "large", lambda text: text + "#" * 2**20)
    assert main(["export", str(large), f"to={tmp_path / 'out'}"]) == 64
    assert "more than 1048576" in capfd.readouterr().err

    def asks(text: str) -> str:
        assert "notes: ''" in text or "tags: []" in text
        return text.replace("tags: []", "tags:\n  - ${oc.env:OF_THE_READER}")

    nosy = with_config(root, tmp_path / "nosy", asks)
    assert load_frozen_config(nosy / "config.yaml").logging.tags == ["${oc.env:OF_THE_READER}"]  # a text, as it stands
    assert main(["export", str(nosy), f"to={tmp_path / 'nosy-out'}"]) == 0
    written = [path for path in (tmp_path / "nosy-out").rglob("*") if path.suffix in (".md", ".json", ".yaml")]
    assert any("${oc.env:OF_THE_READER}" in path.read_text() for path in written)
    assert not any("not-to-be-told" in path.read_text() for path in written)
    assert "not-to-be-told" not in "".join(capfd.readouterr())


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "took more than 1 seconds"),
        ("{% set x = 'x' * 10**11 %}{{ x }}", "wanted more than 0.25 GiB of memory"),
        # Harmless while the tokenizer is looked at, and with a conversation that it waits for no more.
        ("{% if 'to count' in messages|string %}{{ '%2000000000d' % 1 }}{% endif %}", "wanted more than 0.25 GiB"),
    ],
)
def test_a_chat_template_that_never_ends_or_multiplies_is_refused(root, tmp_path, monkeypatch, capfd, template, said):
    monkeypatch.setattr(template_limits, "MAX_CPU_SECONDS", 1)
    monkeypatch.setattr(template_limits, "MAX_EXTRA_BYTES", 2**28)
    exceeded = []
    known = template_limits.TemplateLimitExceeded.__init__
    monkeypatch.setattr(
        template_limits.TemplateLimitExceeded,
        "__init__",
        lambda self, *why: (exceeded.append(why), known(self, *why))[1],
    )
    (tmp_path / "theirs.jinja").write_text(template)
    rows = [
        {"messages": [{"role": "user", "content": f"to count {i}"}, {"role": "assistant", "content": "1"}]}
        for i in range(9)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = [f"data.path={tmp_path / 'rows.jsonl'}", f"model.chat_template={tmp_path / 'theirs.jinja'}"]
    assert main(["prepare", f"model.path={root / 'llama'}", f"data.cache_dir={tmp_path / 'cache'}", *asked]) == 64
    shown = capfd.readouterr().err
    assert said in shown and "model.chat_template" in shown and "Traceback" not in shown
    assert len(exceeded) == 1, "it is refused at once, and not tried again"


def test_a_secret_is_neither_written_nor_shown(root, tmp_path, monkeypatch, capfd):
    """A token that was typed, one that an interpolation brought in, a password in an address, and one in a library's error."""
    monkeypatch.setenv("MY_SERVICE_TOKEN", "quite-a-secret-42")
    monkeypatch.setenv("MY_PASS", "another-secret-43")
    token = "hf_" + "aB3" * 12
    secrets = (token, "quite-a-secret-42", "another-secret-43", "pass-word")
    typed = words(root, "mine", f"run.dir={tmp_path / 'mine'}")
    for word, kind in (
        (f"logging.tags=[{token}]", "a token of Hugging Face"),
        ("logging.tags=['${oc.env:MY_SERVICE_TOKEN}']", "the environment variable MY_SERVICE_TOKEN"),
        ("logging.tags=['${oc.env:MY_PASS}']", "the environment variable MY_PASS"),
        ("data.path=https://me:pass-word@example.org/rows.jsonl", "a password in an address"),
    ):
        assert main([*typed, word]) == 64
        shown = capfd.readouterr().err
        assert kind in shown and not any(secret in shown for secret in secrets)
        assert not (tmp_path / "mine").exists()
    (tmp_path / "failed").mkdir()
    error = RuntimeError(f"GET https://example.org/x?token={token}&n=1 with Bearer quite-a-secret-42: 401")
    record_failure(tmp_path / "failed", 0, error, "reading")
    write_status(tmp_path / "failed", RunState.failed, reason=str(error))
    for name in ("failure.json", "status.json"):
        text = (tmp_path / "failed" / name).read_text()
        assert "[secret]&n=1 with Bearer [secret]: 401" in text and token not in text and "quite-a" not in text

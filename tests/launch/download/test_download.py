"""`shardtune download` from a hub of its own, and a run of what it pinned on a machine that reaches no hub."""

import hashlib
import json
import subprocess
import sys

import pytest
import yaml

from launch.main import main
from tests.helpers.building import model_dir
from tests.helpers.hub import COMMIT, hub
from tests.helpers.launching import ROOT, clean_environment
from tests.helpers.tokenizers import write_chat_data

CALLS = """
import json, sys
from pathlib import Path
from launch.main import main

def damage(file):
    path = Path(file)
    path.chmod(0o644)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    return 0

codes = [damage(call[1]) if call[0] == "damage" else main(call) for call in json.loads(sys.argv[1])]
print(codes, file=sys.stderr)
"""
"""Commands, one after the other in one process, whose libraries read where the hub is when they are imported."""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """What one download from a hub, asked twice, left and said."""
    root = tmp_path_factory.mktemp("download")
    model_dir(root / "served/models/org")
    (root / "served/datasets/org/chats").mkdir(parents=True)
    write_chat_data(root / "served/datasets/org/chats/train.jsonl", 32)
    words = ["model.path=org/llama", "data.path=hub:org/chats", "to=pinned.yaml"]
    with hub(root / "served") as (address, asked):
        calls = [["download", *words, "--dry-run"], ["download", *words], ["download", *words, "--json"]]
        done = here(root, [*calls, ["download", "model.path=org/none", "to=pinned.yaml"]], HF_ENDPOINT=address)
    assert done.stderr.endswith("[0, 0, 0, 64]\n"), done.stderr
    return root, done.stdout, asked, done.stderr


def here(root, calls, **env):
    return subprocess.run(
        [sys.executable, "-c", CALLS, json.dumps(calls)],
        cwd=root,
        env=clean_environment(HF_HOME=str(root / "hf"), PYTHONPATH=str(ROOT), **env),
        capture_output=True,
        text=True,
        check=False,
    )


def test_download_is_pinned_listed_and_not_repeated(site):
    root, out, asked, _ = site
    pinned = yaml.safe_load((root / "pinned.yaml").read_text())
    assert pinned["model"] == {"path": "org/llama", "revision": COMMIT}
    assert pinned["data"] == {"sources": {"chats": {"path": "hub:org/chats", "revision": COMMIT}}}
    model, data = json.loads((root / "pinned.json").read_text())["pieces"]
    served = root / "served/models/org/llama"
    assert {file["path"]: file["sha256"] for file in model["files"]} == {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in served.iterdir()
    }
    assert data["commit"] == COMMIT and data["files"]
    planned, *_, last = out.splitlines()
    assert f"model.path: model org/llama at {COMMIT[:12]}" in planned and "to fetch" in planned
    assert json.loads(last)["pieces"][0]["files"] == model["files"]
    assert sum(line.startswith("GET") and line.endswith("/model.safetensors") for line in asked) == 1


def test_download_lets_a_run_start_without_a_hub_and_names_damage(site):
    root, *_ = site
    words = ["strategy=single", "debug=tiny", "run.device=cpu", "budget.steps=1", "run.dir=run", "export.at_end=false"]
    words += ["logging.wandb=disabled", "logging.report=false"]
    offline = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "1"}
    piece = json.loads((root / "pinned.json").read_text())["pieces"][0]
    [weights] = [file["path"] for file in piece["files"] if file["path"].endswith(".safetensors")]
    place = (root / "hf" / piece["directory"] / weights).resolve()
    verify = ["download", "--verify", "pinned.yaml"]
    done = here(root, [verify, ["train", "pinned.yaml", *words], ["damage", str(place)], verify], **offline)
    assert done.stderr.endswith("[0, 0, 0, 69]\n"), done.stderr
    sound, _, damaged = done.stdout.partition("as fetched")
    assert damaged and "SHA-256 is not that of what was fetched" not in sound and (root / "run/metrics.jsonl").exists()
    assert "SHA-256 is not that of what was fetched" in damaged


def test_download_refusals(site, tmp_path, capsys):
    assert "model.path=org/none: cannot be had from the hub" in site[3] and "HF_TOKEN" in site[3]
    for words, said in (
        ([f"model.path={tmp_path}"], "nothing here is named by a hub id"),
        (["model.path=org/llama", "to=there"], "a name that ends in .yaml"),
        (
            ["model.path=org/llama", "data.path=hub:org/a", "data.eval_path=hub:org/b"],
            "only training data can be pinned",
        ),
        (["model.path=org/llama", "--fast"], "--fast: there is no such flag"),
        (["--verify", str(tmp_path / "none.yaml")], "is no list that download wrote"),
        (["--verify"], "name one file, not 0"),
    ):
        assert main(["download", *words]) == 64
        assert said in capsys.readouterr().err

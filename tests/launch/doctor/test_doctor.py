"""`shardtune doctor`: what it finds on this machine is so, and what is missing is named with what to do."""

import importlib
import json
import re
import runpy
import sys
import types
from importlib import metadata
from pathlib import Path

import pytest
import torch

from launch.doctor import machine
from launch.main import main
from strategies import runtime
from tests.helpers.launching import ROOT

GIB = 2**30


def looked(capsys, code: int = 0) -> dict:
    assert main(["doctor", "--json"]) == code
    return json.loads(capsys.readouterr().out)


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    """No SLURM, no driver, and an environment without a job."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    for name in (*machine.RANK_VARIABLES, *machine.OFFLINE_VARIABLES):
        monkeypatch.delenv(name, raising=False)


def command(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / "bin").mkdir(exist_ok=True)
    (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
    (tmp_path / "bin" / name).chmod(0o755)


def needs(monkeypatch, *requirements: str) -> None:
    monkeypatch.setattr(machine.metadata, "metadata", lambda name: types.SimpleNamespace(get_all=lambda key: ["gpu"]))
    monkeypatch.setattr(machine.metadata, "requires", lambda name: list(requirements))
    really = metadata.version
    monkeypatch.setattr(machine.metadata, "version", lambda name: "0.1.0" if name == "shardtune" else really(name))


def test_doctor_describes_this_machine(capsys, monkeypatch, tmp_path):
    needs(monkeypatch, "torch>=2.13", "packaging>=20", "flash-attn>=2.8; extra == 'gpu'")
    monkeypatch.setenv("SHARDTUNE_CACHE", str(tmp_path / "kept"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    (tmp_path / "hf" / "hub" / "models--a--b").mkdir(parents=True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(runtime, "num_usable_cores", lambda: 3)
    monkeypatch.setattr(runtime, "cgroup_memory_limit", lambda: 2 * GIB)
    found = looked(capsys)
    assert found["packages"] == {"torch": metadata.version("torch"), "packaging": metadata.version("packaging")}
    assert found["extras"]["gpu"]["lacks"] == ["flash-attn is not installed"]
    assert (found["cores"], found["memory_gib"]) == (3, 2.0) and found["memory_free_gib"] > 0
    assert (found["slurm"], found["offline"]) == (False, {"HF_HUB_OFFLINE": "1"})
    assert found["places"]["cache"]["path"] == str(tmp_path / "kept") and not found["places"]["cache"]["exists"]
    assert found["models"] == 1 and found["places"]["models"]["exists"]
    assert len(found["gpus"]) == torch.cuda.device_count() and found["problems"] == []
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "flash-attn is not installed (pip install -e '.[gpu]')" in " ".join(out.split())
    assert out.endswith("a run can start here\n")
    assert max(len(line) for line in out.splitlines() if str(tmp_path) not in line) <= 80


def test_doctor_looks_for_every_extra_for_users(monkeypatch):
    asked = {}
    monkeypatch.setattr("setuptools.setup", lambda **settings: asked.update(settings))
    monkeypatch.chdir(ROOT)
    runpy.run_path("setup.py")
    assert set(machine.EXTRAS) == set(asked["extras_require"]) - {"test", "check", "docs"}


def test_doctor_packages_that_are_missing_or_old_are_problems(capsys, monkeypatch):
    needs(monkeypatch, "torch>=99", "nothing-of-that-name>=1", "packaging")
    assert looked(capsys, 69)["problems"] == [
        f"torch is {metadata.version('torch')}, and >=99 is needed: pip install 'torch>=99'",
        "nothing-of-that-name is not installed: pip install 'nothing-of-that-name>=1'",
    ]
    assert main(["doctor"]) == 69
    assert "problems:\n  torch is " in capsys.readouterr().out


def test_doctor_without_an_installation_says_what_was_not_looked_up(capsys, monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(machine.metadata, "metadata", missing)
    assert any("shardtune is not installed" in note for note in looked(capsys)["notes"])
    assert main(["doctor"]) == 0


def test_a_torch_that_cannot_be_imported_is_a_problem(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert any(problem.startswith("torch cannot be imported: ") for problem in looked(capsys, 69)["problems"])
    assert main(["doctor"]) == 69


def test_doctor_reports_gpus_that_torch_does_not_see(capsys, monkeypatch, tmp_path):
    command(tmp_path, "nvidia-smi", "echo 550.54.15; echo 550.54.15")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    [problem] = [each for each in looked(capsys, 69)["problems"] if "torch sees none" in each]
    assert "install a CUDA build" in problem
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    [problem] = [each for each in looked(capsys, 69)["problems"] if "torch sees none" in each]
    assert "built for CUDA 13.0, which driver 550.54.15 may be too old for" in problem


def test_doctor_reports_gpus_and_the_processes_on_them(capsys, monkeypatch):
    gpu = types.SimpleNamespace(name="Card", major=8, minor=0, gcnArchName="")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Card")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: ((79 if device.index else 20) * GIB, 80 * GIB))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.version, "hip", None)
    found = looked(capsys)
    assert [each["free_gib"] for each in found["gpus"]] == [20, 79] and found["precision"] == "bf16"
    assert [note for note in found["notes"] if "GPU" in note] == ["GPU 0: other processes use 60.0 of its 80.0 GiB"]
    assert main(["doctor"]) == 0
    assert re.search(r"^gpu 1 +Card, 80.0 GiB, 79.0 GiB free$", capsys.readouterr().out, re.MULTILINE)


def test_doctor_reports_variables_that_would_change_a_run(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("RANK", "0")
    command(tmp_path, "sbatch", "exit 1")
    command(tmp_path, "squeue", "echo 'squeue: error: no controller' >&2; exit 1")
    other = importlib.util.module_from_spec(importlib.machinery.ModuleSpec("conf", None))
    other.__file__ = str(tmp_path / "conf" / "__init__.py")
    monkeypatch.setitem(sys.modules, "conf", other)
    found = looked(capsys, 69)
    assert any("RANK in the environment" in note for note in found["notes"])
    assert any("its controller is not: squeue failed: error: no controller" in note for note in found["notes"])
    assert [each for each in found["problems"] if "another package conf hides ours" in each]
    monkeypatch.delenv("RANK")
    assert main(["doctor", "--quick"]) == 64
    assert "doctor takes --verify, --json and --help" in capsys.readouterr().err
    assert main(["doctor", "launcher.nodes=2", "launcher.rdzv=n1:29400", "run.dir=x"]) == 64
    assert "else call doctor on each of them" in capsys.readouterr().err

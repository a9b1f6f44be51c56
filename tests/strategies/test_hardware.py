"""What is chosen for a GPU, without one: devices are described as their drivers would."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from launch.config import host_devices
from launch.config.compose import compose_config
from strategies import build, runtime
from strategies.base import Precision
from strategies.errors import ConfigError
from strategies.hardware import Gpu, best_precision, cpu_has_bf16, gpu_of_device, slow_precision_warning
from strategies.runtime import Runtime, why_cuda_is_missing
from trainer.config.run import Device
from trainer.model import attention

CARDS = [
    (Gpu("Tesla P100-PCIE-16GB", (6, 0)), Precision.fp32),
    (Gpu("Tesla V100-SXM2-32GB", (7, 0)), Precision.fp16),
    (Gpu("Tesla T4", (7, 5)), Precision.fp16),
    (Gpu("NVIDIA A100-SXM4-80GB", (8, 0)), Precision.bf16),
    (Gpu("NVIDIA GeForce RTX 4090", (8, 9)), Precision.bf16),
    (Gpu("NVIDIA H100 80GB HBM3", (9, 0)), Precision.bf16),
    (Gpu("NVIDIA B200", (10, 0)), Precision.bf16),
    (Gpu("AMD Radeon VII", (9, 0), "gfx906:sramecc-:xnack-"), Precision.fp16),
    (Gpu("AMD Instinct MI250X", (9, 0), "gfx90a:sramecc+:xnack-"), Precision.bf16),
    (Gpu("AMD Instinct MI300X", (9, 4), "gfx942:sramecc+:xnack-"), Precision.bf16),
]


def rank(device="cuda:0"):
    return Runtime(0, 1, 0, 1, torch.device(device), None)


@pytest.fixture
def described(monkeypatch):
    """Let torch describe a GPU that is not there."""

    def describe(gpu):
        found = SimpleNamespace(
            name=gpu.name, major=gpu.capability[0], minor=gpu.capability[1], gcnArchName=gpu.architecture
        )
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
        monkeypatch.setattr(torch.version, "hip", None if gpu.architecture is None else "6.4")

    return describe


@pytest.mark.parametrize(("card", "precision"), CARDS, ids=lambda value: getattr(value, "name", ""))
def test_precision_auto_goes_by_the_capability_and_not_by_emulation(card, precision, described, monkeypatch):
    described(card)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)  # what torch says of all of them
    assert gpu_of_device(torch.device("cuda:0")) == card
    assert build.resolve_precision(Precision.auto, rank()) is precision
    assert attention._has_flash_kernel(torch.device("cuda:0"), 128) == (precision is Precision.bf16)


def test_precision_that_was_typed_stays_and_cpus_compute_in_fp32():
    assert build.resolve_precision(Precision.bf16, rank("cpu")) is Precision.bf16
    assert build.resolve_precision(Precision.auto, rank("cpu")) is Precision.fp32
    assert best_precision(gpu_of_device(torch.device("cpu"))) is Precision.fp32


def test_precision_auto_is_that_of_the_least_capable_rank(described, monkeypatch):
    described(Gpu("NVIDIA H100 80GB HBM3", (9, 0)))
    monkeypatch.setattr(build, "gather_objects", lambda mine, runtime: [mine, Precision.fp16])
    assert build.resolve_precision(Precision.auto, rank()) is Precision.fp16


@pytest.mark.parametrize(
    ("said", "precision"),
    [
        ("7.5\n", Precision.fp16),
        ("9.0\n9.0\n", Precision.bf16),
        ("10.0\n8.0\n", Precision.bf16),
        ("8.0\n7.5\n", Precision.auto),
        ("", Precision.auto),
        ("[N/A]\n", Precision.auto),
    ],
)
def test_precision_auto_of_the_launcher_is_asked_of_the_driver(said, precision, monkeypatch):
    answer = subprocess.CompletedProcess([], 0, stdout=said)
    monkeypatch.setattr(host_devices.subprocess, "run", lambda *_, **__: answer)
    assert host_devices.best_precision_here(Device.cuda) is precision
    assert host_devices.best_precision_here(Device.cpu) is Precision.fp32


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiled_blocks_know_the_device_too(dynamic, monkeypatch):
    """The question must not break a compiled block apart, whose sizes may be symbols."""
    monkeypatch.setattr(attention, "gpu_of_device", lambda device: Gpu("NVIDIA GeForce RTX 4090", (8, 9)))

    def block(x):
        return x + 1 if attention._has_flash_kernel(x.device, x.shape[-1]) else x - 1

    compiled = torch.compile(block, fullgraph=True, backend="eager", dynamic=dynamic)
    found = [float(compiled(torch.ones(3, head))[0, 0]) for head in (64, 128, 100, 208, 256)]
    assert found == [2, 2, 0, 0, 2]
    torch.compiler.reset()


def test_a_missing_device_is_named_before_any_work(tmp_path, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "train.jsonl").write_text("{}\n")
    words = [f"model.path={tmp_path}", f"data.path={tmp_path}/train.jsonl", "budget.steps=1", "run.device=cuda"]
    with pytest.raises(ConfigError, match=r"run.device=cuda: .*set run.device=cpu") as refusal:
        compose_config(words)
    assert str(refusal.value).count("run.device") == 2, "the setting and its remedy, once each"
    with pytest.raises(ConfigError, match=r"run.device=cuda: .*set run.device=cpu"):
        runtime.join_job("cuda", timeout_s=60)
    monkeypatch.setattr(torch.version, "cuda", "12.9")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "CUDA_VISIBLE_DEVICES=''" in why_cuda_is_missing()
    compose_config([*words, "launcher=slurm"])  # to be run on other hosts
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    compose_config([*words, "launcher.processes=2", "strategy=fsdp2"])
    with pytest.raises(ConfigError, match=r"launcher.processes=4: each needs a GPU of its own, and this host has 2"):
        compose_config([*words, "launcher.processes=4", "strategy=fsdp2"])


def test_device_auto_on_cpus_beside_gpus_says_why(tmp_path, monkeypatch):
    """A driver that is too old for this torch let a run of `run.device=auto` go on, without a word, on the CPU."""

    def too_old():
        raise RuntimeError(
            "The NVIDIA driver on your system is too old (found version 11040). Please update it at https://"
        )

    (tmp_path / "train.jsonl").write_text("{}\n")
    words = [f"model.path={tmp_path}", f"data.path={tmp_path}/train.jsonl", "budget.steps=1"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", too_old)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert compose_config(words).config.substitutions["run.device"] == "auto -> cpu"
    monkeypatch.setattr(host_devices, "count_nvidia_gpus", lambda: 8)
    found = compose_config(words).config.substitutions["run.device"]
    assert found.startswith("auto -> cpu, beside 8 GPUs") and "too old (found version 11040); does" in found


EMULATES = """
from strategies.base import Precision
from strategies.hardware import slow_precision_warning
print(slow_precision_warning(Precision.bf16, "cpu"))
"""


@pytest.mark.parametrize(
    ("known", "runs"),
    [
        ({"avx512_f": True}, False),  # AVX-512 alone: oneDNN says that it has bf16, and emulates it
        ({"avx2": True, "amx_tile": False}, False),
        ({"avx512_bf16": True}, True),
        ({"amx_bf16": True}, True),
        ({"neon": True, "bf16": True}, True),
    ],
)
def test_bf16_that_a_processor_emulates_is_reported(known, runs, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    assert cpu_has_bf16() == runs
    said = slow_precision_warning(Precision.bf16, "cpu")
    assert (said is None) == runs and (runs or "set precision=fp32" in said)
    assert slow_precision_warning(Precision.fp32, "cpu") is None
    assert slow_precision_warning(Precision.bf16, "cuda") is None


def test_bf16_instructions_that_onednn_may_not_use_do_not_count():
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    shown = subprocess.run(
        [sys.executable, "-c", EMULATES], env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert "precision=fp32" in shown

"""Packages with kernels for hybrids: which models ask for which, and that on CPUs none of them is called."""

import importlib.util
import subprocess
import sys

import pytest
import transformers

from strategies.parameters import meta_context
from tests.helpers.launching import ROOT, clean_environment
from tests.helpers.speed import seconds
from tests.models import tiny
from trainer.data.config import Layout
from trainer.model import kernels
from trainer.model.config import ModelConfig
from trainer.objectives import forward_path, layout_choice
from trainer.objectives.causal import FUSED_PATH

ASKED = {
    "qwen3_next": ["causal_conv1d", "fla"],
    "lfm2": ["causal_conv1d"],
    "bamba": ["causal_conv1d", "mamba_ssm"],
    "llama": [],
}
PROOF = """
import sys
import torch, transformers
from tests.models import tiny
from trainer.model import attention, kernels
from trainer.model.compat import without_kernel_packages
from trainer.objectives import forward_path
from strategies.parameters import meta_context

attention.register()
config = tiny.tiny_config("qwen3_next")
with meta_context():
    plain = transformers.AutoModelForCausalLM.from_config(config)
ids = torch.arange(9)[None]
model = transformers.AutoModelForCausalLM.from_config(config)
try:
    model(input_ids=ids, use_cache=False)
except RuntimeError as error:
    assert "a kernel on a CPU" in str(error)
else:
    sys.exit("the stand-in was not called at all")
with without_kernel_packages():
    model(input_ids=ids, use_cache=False)
found = forward_path._prove_paths(config, lambda: plain, attention.VARLEN_ATTENTION, on_gpu=False)
print(found.padded, kernels.missing_kernels(plain))
"""


def model_of(kind):
    with meta_context():
        return transformers.AutoModelForCausalLM.from_config(tiny.tiny_config(kind))


@pytest.fixture
def installed(monkeypatch):
    """Packages that are said to be there; the others are not."""
    there: set[str] = set()
    real = importlib.util.find_spec

    def find(name, *rest):
        return object() if name in there else None if name in kernels.EXTRA_BY_PACKAGE else real(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", find)
    return there


@pytest.mark.parametrize("kind", ASKED)
def test_kernel_packages_are_those_of_each_model(kind, installed):
    model = model_of(kind)
    assert kernels.kernel_packages(model) == ASKED[kind]
    installed.update(ASKED[kind])
    assert not kernels.missing_kernels(model)


def test_kernel_packages_that_are_missing_are_named_with_the_command_to_install_them(installed):
    assert kernels.missing_kernels(model_of("qwen3_next")) == (
        "loops in torch, right but slow, for what causal-conv1d and flash-linear-attention would compute "
        "(pip install -e '.[hybrid]')"
    )
    assert ".[hybrid,mamba]" in kernels.missing_kernels(model_of("bamba"))
    installed.add("causal_conv1d")
    assert "for what flash-linear-attention would" in kernels.missing_kernels(model_of("qwen3_next"))


def test_kernel_packages_are_on_the_start_screen_of_a_gpu_alone(installed, monkeypatch):
    right = forward_path.ProvenPaths(padding_free=FUSED_PATH, padded=FUSED_PATH)
    monkeypatch.setattr(layout_choice, "proven_paths", lambda *_, **__: right)
    for on_gpu in (False, True):
        _, found = layout_choice.build_causal_model(
            ModelConfig(path="x"),
            tiny.tiny_config("qwen3_next"),
            Layout.padded,
            needs_padding=False,
            half_on_gpu=on_gpu,
        )
        assert ("model.kernels" in found.notes) == on_gpu


def test_kernel_packages_are_not_called_on_a_cpu(tmp_path):
    """transformers takes what it can import for tensors on CPUs too: a proof there, and the check of an export, would fail."""
    for package, name in (
        ("causal_conv1d", "causal_conv1d_fn"),
        ("fla/ops/gated_delta_rule", "chunk_gated_delta_rule"),
    ):
        directory = tmp_path
        for part in package.split("/"):
            directory = directory / part
            directory.mkdir()
            (directory / "__init__.py").touch()
        body = 'raise RuntimeError("a kernel on a CPU")'
        (directory / "__init__.py").write_text(f"def {name}(*args, cu_seqlens=None, seq_idx=None):\n    {body}\n")
    done = subprocess.run(
        [sys.executable, "-c", PROOF],
        env=clean_environment(PYTHONPATH=f"{tmp_path}:{ROOT}"),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=seconds(150),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip().endswith("ForwardPath(fused=True, positions=True, alone=False)")

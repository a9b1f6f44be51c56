"""Which attention a run gets, by package, GPU and heads; the GPU and the package are described, not there."""

from types import SimpleNamespace

import pytest
import torch

from strategies.errors import ConfigError
from strategies.hardware import Gpu
from trainer.data.config import Layout
from trainer.model import attention
from trainer.model.config import Attention, ModelConfig
from trainer.model.flash import head_sizes, why_not_flash
from trainer.model.layout import KernelChoices, choose_attention_layout

H100, RTX_4090, SPARK, T4 = (
    Gpu("NVIDIA H100 80GB HBM3", (9, 0)),
    Gpu("NVIDIA GeForce RTX 4090", (8, 9)),
    Gpu("NVIDIA GB10", (12, 1)),
    Gpu("Tesla T4", (7, 5)),
)


def heads(size, **more):
    return SimpleNamespace(head_dim=size, hidden_size=4096, num_attention_heads=32, **more)


@pytest.fixture
def package(monkeypatch):
    """Let transformers find a distribution behind the module `flash_attn`, on a GPU."""
    from transformers.utils import import_utils

    def install(distribution, version):
        import_utils.is_flash_attn_2_available.cache_clear()
        there = distribution is not None
        monkeypatch.setattr(import_utils, "_is_package_available", lambda name, **_: (there, version))
        monkeypatch.setattr(import_utils, "_package_distribution_mapping", lambda: {"flash_attn": [distribution]})
        monkeypatch.setattr(import_utils, "is_torch_cuda_available", lambda: True)

    yield install
    import_utils.is_flash_attn_2_available.cache_clear()


def test_flash_version_4_under_the_same_name_is_not_version_2(package):
    package("flash_attn", "2.8.3")
    assert why_not_flash(heads(128), H100, half_precision=True) is None
    for distribution, version in (("flash-attn-4", "4.0.0"), ("flash_attn", "2.1.0"), (None, "N/A")):
        package(distribution, version)
        assert "is not installed" in why_not_flash(heads(128), H100, half_precision=True)


def test_flash_checks_gpu_precision_and_heads_when_composing(package):
    package("flash_attn", "2.8.3")
    assert "needs a GPU" in why_not_flash(heads(128), None, half_precision=True)
    assert "needs a GPU" in why_not_flash(heads(128), H100, half_precision=False)
    assert "not built for Tesla T4" in why_not_flash(heads(128), T4, half_precision=True)
    assert "heads of 512" in why_not_flash(heads(256, global_head_dim=512), H100, half_precision=True)
    assert "heads of 100" in why_not_flash(heads(100), H100, half_precision=True)
    assert "no heads of 208 on NVIDIA GeForce" in why_not_flash(heads(208), RTX_4090, half_precision=True)
    assert "no heads of 208 on NVIDIA GB10" in why_not_flash(heads(208), SPARK, half_precision=True)
    assert why_not_flash(heads(208), H100, half_precision=True) is None
    assert why_not_flash(heads(256), RTX_4090, half_precision=True) is None
    assert "with dropout" in why_not_flash(heads(256), RTX_4090, half_precision=True, dropout=0.1)
    assert why_not_flash(heads(256), H100, half_precision=True, dropout=0.1) is None


def test_sizes_of_heads_are_read_from_real_configurations():
    from transformers import DeepseekV3Config, Gemma2Config, GPT2Config, LlamaConfig

    assert head_sizes(LlamaConfig(hidden_size=96, num_attention_heads=3)) == [32]
    assert head_sizes(GPT2Config(n_embd=60, n_head=5)) == [12]
    assert head_sizes(Gemma2Config(hidden_size=64, num_attention_heads=8, head_dim=256)) == [256]
    latent = DeepseekV3Config(qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)
    assert head_sizes(latent)[-1] == 192


def test_flash_kernel_of_torch_has_the_same_conditions(monkeypatch):
    monkeypatch.setattr(attention, "gpu_of_device", lambda device: RTX_4090)
    device = torch.device("cuda:0")
    assert [attention._has_flash_kernel(device, size) for size in (64, 100, 208, 256, 264)] == [
        True,
        False,
        False,
        True,
        False,
    ]


def layout(choice, wanted, flash_refusal):
    config = ModelConfig(path="model", attention=choice)
    found = choose_attention_layout(
        config.attention,
        wanted,
        "llama",
        reason_for_own_rows=lambda _: "",
        needs_padding=False,
        kernels=KernelChoices(flash_refusal, None),
    )
    return found.layout, found.attention, found.notes


def test_flash_that_cannot_be_used_is_refused_where_asked_for_and_noted_where_not():
    for wanted in (Layout.padding_free, Layout.padded, Layout.auto):
        with pytest.raises(ConfigError, match=r"flash_attention_2: it is not built for x; use model.attention=auto"):
            layout(Attention.flash_attention_2, wanted, "it is not built for x")
        assert layout(Attention.flash_attention_2, wanted, None)[1] == "flash_attention_2"
    kind, name, notes = layout(Attention.auto, Layout.auto, "it is not built for x")
    assert (kind, name) == (Layout.padding_free, attention.VARLEN_ATTENTION)
    assert notes == {"model.attention": "varlen (built in; not FlashAttention: it is not built for x)"}
    assert layout(Attention.auto, Layout.auto, None) == (Layout.padding_free, "flash_attention_2", {})

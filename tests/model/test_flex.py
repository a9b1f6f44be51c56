"""Flex attention: what is computed on CPUs is what torch's own operator computes, and the masks are those of the models."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers

from strategies import runtime as processes
from strategies.base import ActivationCheckpointing, Precision, SingleConfig
from strategies.errors import ConfigError
from strategies.parameters import meta_context
from tests.helpers.building import GLOBAL_BATCH, alone, built_trainer, data_set, run_config, take_steps
from tests.models import job
from trainer.build.parts import build_model, largest_micro_batch
from trainer.build.recomputation import counted_activations
from trainer.data.config import Layout
from trainer.export.verify import reference_logits
from trainer.model import attention, flex
from trainer.model.config import Attention, ModelConfig
from trainer.model.layout import KernelChoices, choose_attention_layout
from trainer.model.loading import load_tokenizer
from trainer.objectives import forward_path, layout_choice

SIZES = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16}
CONFIGS = {
    "sinks": lambda: transformers.GptOssConfig(**SIZES, num_key_value_heads=2, intermediate_size=64),
    "caps": lambda: transformers.Gemma2Config(**SIZES, num_key_value_heads=2, intermediate_size=64),
    "chunks": lambda: transformers.Llama4TextConfig(
        **SIZES, num_key_value_heads=2, intermediate_size=64, intermediate_size_mlp=64, num_local_experts=2
    ),
    "plain": lambda: transformers.LlamaConfig(**SIZES, intermediate_size=64),
}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Findings of this test alone."""
    attention.register()
    flex.register()
    monkeypatch.setenv("SHARDTUNE_CACHE", str(tmp_path))


@pytest.fixture
def runtime(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    yield alone(processes.join_job("cpu", timeout_s=60, threads=1))
    processes.leave_job()


def proven(kind):
    config = CONFIGS[kind]()
    with meta_context():
        plain = transformers.AutoModelForCausalLM.from_config(config)
    return forward_path._prove_paths(config, lambda: plain, flex.FLEX_ATTENTION, on_gpu=False), plain, config


@pytest.mark.parametrize("kind", ["sinks", "caps", "chunks"])
def test_flex_attention_with_windows_sinks_caps_and_chunks_is_proven_in_one_row(kind):
    """Loss and gradients against the stock model in eager attention on each document apart."""
    found, plain, config = proven(kind)
    assert found.padding_free is not None, found.reason
    assert flex.needs_eager(plain, config) is (kind != "chunks") and flex.flex_refusal(plain, [16], dropout=0.0) is None


def test_flex_attention_without_its_cap_fails_the_proof(monkeypatch):
    monkeypatch.setattr(flex, "_softcap_scores", lambda _cap: lambda score, *_: score)
    assert proven("caps")[0].padding_free is None


def made_mask(bounds, function, **more):
    with flex.masks_keep_documents_apart({"cu_seq_lens_q": torch.tensor(bounds, dtype=torch.int32)}):
        return flex.block_mask(1, bounds[-1], bounds[-1], mask_function=function, **more)


@pytest.mark.parametrize("heads", [(4, 2), (6, 2), (4, 4)])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_flex_attention_over_pairs_is_what_the_operator_computes(heads, softcap, monkeypatch):
    """torch's operator runs forward on CPUs: values, and the sums that sinks are put beside."""
    mask = made_mask([0, 5, 28, 42], lambda _batch, _head, q, k: (q >= k) & (q - k < 8))
    draw = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(1, h, 42, 16, generator=draw) for h in (heads[0], heads[1], heads[1]))
    options = {"scaling": 0.3, "softcap": softcap, "s_aux": torch.randn(heads[0], generator=draw)}
    found, _ = flex.flex_attention(torch.nn.Module(), q, k, v, mask, **options)
    monkeypatch.setattr(flex, "_attend_over_pairs", flex._attend_by_kernel)
    monkeypatch.setattr(flex, "_compiled", lambda function: function)
    expected, _ = flex.flex_attention(torch.nn.Module(), q, k, v, mask, **options)
    assert torch.allclose(found, expected, atol=1e-6)
    without, _ = flex.flex_attention(torch.nn.Module(), q, k, v, mask, **options | {"s_aux": None})
    assert not torch.allclose(without, expected, atol=1e-3)


def test_flex_attention_refuses_what_it_does_not_compute():
    q = torch.randn(1, 2, 4, 16)
    with pytest.raises(ValueError, match="makes none"):
        flex.flex_attention(torch.nn.Module(), q, q, q, None)
    mask = made_mask([0, 4], lambda _batch, _head, q, k: q >= k)
    with pytest.raises(ValueError, match="no dropout"):
        flex.flex_attention(torch.nn.Module(), q, q, q, mask, dropout=0.1)
    with pytest.raises(ValueError, match="document boundaries"):
        flex.block_mask(1, 4, 4, mask_function=None)
    with pytest.raises(ValueError, match="document boundaries"):
        made_mask([0, 4], None, attention_mask=torch.ones(1, 4))


def test_flex_attention_tells_transformers_the_documents_it_would_search_for():
    from transformers import masking_utils

    find = masking_utils.find_packed_sequence_indices
    flex.register()
    assert masking_utils.find_packed_sequence_indices is find, "registered twice, it asks once"
    positions, one = torch.cat([torch.arange(n) for n in (5, 23, 14)])[None], torch.arange(42)[None]
    by_positions = find(positions)
    with flex.masks_keep_documents_apart({"cu_seq_lens_q": torch.tensor([0, 5, 28, 42], dtype=torch.int32)}):
        told = find(positions)
        with flex.masks_keep_documents_apart({"attention_mask": torch.ones(1, 42)}):  # another model, on padded rows
            assert find(one) is None
        assert torch.equal(find(one), told), "what is declared goes before what positions say"
    assert torch.equal(told - told[:, :1], by_positions)
    with flex.masks_keep_documents_apart({"cu_seq_lens_q": torch.tensor([0, 42], dtype=torch.int32, device="meta")}):
        assert find(one.to("meta")).shape == (1, 42), "no value is looked at"
    assert find(one) is None and torch.equal(find(positions), by_positions)


def counted(tmp_path, monkeypatch, name, kernel, micro):
    """What a step keeps, as `activation_checkpointing=auto` counts it."""
    directory = tmp_path / name
    if not directory.exists():
        job.made(name, directory, 0)
    data = data_set(tmp_path, uneven=False)
    config = run_config(directory, "single", "full", micro=micro)
    config = replace(config, model=replace(config.model, attention=Attention(kernel)))
    monkeypatch.setattr(layout_choice, "_kernel_choices", lambda *_, **__: KernelChoices("no", None))
    built, _ = build_model(config, load_tokenizer(config.model), data, half_on_gpu=False)
    return counted_activations(built, largest_micro_batch(config, data), Precision.bf16)


def test_flex_attention_memory_is_counted_on_meta(tmp_path, monkeypatch):
    """Of one document the same as what the built-in one keeps, which is counted of SDPA; with sinks, what these add."""
    flexed, built_in = (counted(tmp_path, monkeypatch, "llama", kernel, 1) for kernel in ("flex", "varlen"))
    assert (
        flexed.bytes_by_block_if_none == built_in.bytes_by_block_if_none
        and flexed.bytes_outside_blocks == built_in.bytes_outside_blocks
    )
    for name in ("gpt_oss", "gemma2"):
        found = counted(tmp_path, monkeypatch, name, "flex", 4)
        assert all(
            0 < full < none
            for none, full in zip(found.bytes_by_block_if_none, found.bytes_by_block_if_full, strict=True)
        )


def test_flex_attention_names_why_a_model_cannot_have_it():
    with meta_context():
        llama = transformers.AutoModelForCausalLM.from_config(CONFIGS["plain"]())
        gpt2 = transformers.AutoModelForCausalLM.from_config(transformers.GPT2Config(n_layer=1))
    assert not flex.needs_eager(llama, llama.config)
    assert flex.flex_refusal(llama, [8], dropout=0.0) == "it has no heads of 8, 16 are the least"
    assert flex.flex_refusal(llama, [64], dropout=0.1) == "it has no dropout"
    assert flex.flex_refusal(gpt2, [64], dropout=0.0) == "transformers has none for GPT2LMHeadModel"


def chosen(kernels, right, choice=Attention.auto, layout=Layout.auto):
    found = choose_attention_layout(
        choice,
        layout,
        "kind",
        reason_for_own_rows=lambda kernel: "" if kernel in right else f"{kernel} is off",
        needs_padding=False,
        kernels=kernels,
    )
    return found.attention, found.notes


FLASH, FLEX, OURS = "flash_attention_2", flex.FLEX_ATTENTION, attention.VARLEN_ATTENTION
EVERY = {FLASH, FLEX, OURS}


def test_flex_attention_order_of_choice():
    """FlashAttention, then flex where the model gains by it, the built-in kernel, flex where that one is not right."""
    assert chosen(KernelChoices(None, None, prefers_flex=True), EVERY)[0] == FLASH
    assert chosen(KernelChoices("no", None, prefers_flex=True), EVERY)[0] == FLEX
    assert chosen(KernelChoices("no", None), EVERY)[0] == OURS
    assert chosen(KernelChoices("no", None), {FLEX})[0] == FLEX
    assert chosen(KernelChoices("no", None, prefers_flex=True), {OURS})[0] == OURS
    assert chosen(KernelChoices("no", "no", prefers_flex=True), {FLEX, OURS})[0] == OURS
    name, notes = chosen(KernelChoices("no", "no"), {FLEX})
    assert name == "sdpa" and "shardtune_varlen is off" in notes["data.layout"]
    notes = chosen(KernelChoices("it is not built for x", None, prefers_flex=True), EVERY)[1]
    assert (
        notes["model.attention"].startswith("flex (torch's, compiled") and "not built for x" in notes["model.attention"]
    )


def test_flex_attention_that_is_asked_for_is_taken_or_refused():
    kernels = KernelChoices("no", None)
    assert chosen(kernels, EVERY, Attention.flex) == (FLEX, {})
    with pytest.raises(ConfigError, match=r"model.attention=flex: kind is not proven.*flex is off"):
        chosen(kernels, {OURS}, Attention.flex)
    with pytest.raises(ConfigError, match=r"model.attention=flex: is for padding-free rows"):
        chosen(kernels, EVERY, Attention.flex, Layout.padded)
    with pytest.raises(ConfigError, match=r"model.attention=flex: flex attention needs a GPU.*model.attention=auto"):
        layout_choice.build_causal_model(
            ModelConfig(path="x", attention=Attention.flex),
            copy.deepcopy(CONFIGS["sinks"]()),
            Layout.auto,
            needs_padding=False,
            half_on_gpu=False,
        )


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_a_run_takes_the_steps_of_the_built_in_kernel(tuning, tmp_path, runtime, monkeypatch):
    """Sinks and windows, every block recomputed, the loss on held-out data, and the export's check."""
    model = tmp_path / "gpt_oss"
    job.made("gpt_oss", model, 0)
    data = data_set(tmp_path, uneven=True)
    full = SingleConfig(activation_checkpointing=ActivationCheckpointing.full)
    config = replace(run_config(model, full, tuning, micro=GLOBAL_BATCH), precision=Precision.fp32)
    monkeypatch.setattr(layout_choice, "_kernel_choices", lambda *_, **__: KernelChoices("no", None))
    found = {}
    for kernel, name in ((Attention.flex, FLEX), (Attention.varlen, OURS)):
        asked = replace(config, model=replace(config.model, attention=kernel))
        trainer, built = built_trainer(asked, data, runtime)
        assert (built.attention, built.layout) == (name, Layout.padding_free)
        found[name] = take_steps(trainer, 2), reference_logits(trainer.engine, built, [5, 9, 30], runtime)
    assert np.allclose(found[FLEX][0], found[OURS][0], rtol=1e-5)
    assert torch.allclose(found[FLEX][1], found[OURS][1], atol=1e-4)

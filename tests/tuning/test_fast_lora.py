"""The fused LoRA layers against peft's own, and which layers are left to peft."""

import copy

import pytest
import torch
from torch import nn

from tests.helpers.models import tiny_model_dir
from trainer.tuning import fast_lora
from trainer.tuning.fast_lora import fuse_lora


def peft_model(path, architecture="llama", **settings):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir(path, architecture))
    wanted = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **settings}
    model = get_peft_model(base, LoraConfig(**wanted))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, 0, 0.1)
    return model.train()


def step(model, autocast=False):
    ids = torch.randint(0, 500, (2, 17), generator=torch.Generator().manual_seed(2))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])  # without and with biases
@pytest.mark.parametrize("settings", [{}, {"use_rslora": True, "rank_pattern": {"k_proj": 2, "up_proj": 3}}])
def test_loss_and_gradients_are_pefts(tmp_path, architecture, settings):
    stock = peft_model(tmp_path, architecture, **settings)
    fused = copy.deepcopy(stock)
    assert fuse_lora(fused) == 14  # q, k, v, o, gate, up and down of two blocks
    assert list(fused.state_dict()) == list(stock.state_dict())
    (expected, right), (found, grads) = step(stock), step(fused)
    assert float(found) == pytest.approx(float(expected), rel=1e-6)
    assert grads.keys() == right.keys()
    for name, grad in grads.items():
        assert torch.allclose(grad, right[name], rtol=1e-5, atol=1e-6), name


@pytest.fixture
def widths(monkeypatch):
    """How many layers each call of the function computed."""
    seen = []
    plain = fast_lora._lora_outputs
    monkeypatch.setattr(
        fast_lora, "_lora_outputs", lambda layers, *rest: seen.append(len(layers)) or plain(layers, *rest)
    )
    return seen


def test_fast_lora_layers_over_one_input_compute_together(tmp_path, widths):
    model = peft_model(tmp_path)
    fuse_lora(model)
    step(model)
    assert widths == [3, 1, 2, 1] * 2  # q, k, v; o; gate, up; down
    attention = model.get_base_model().model.layers[0].self_attn
    assert (
        attention.q_proj.shared_input._input is None and not attention.q_proj.shared_input._pending_outputs
    )  # nothing is kept


def test_fast_lora_layer_called_on_another_input_computes_anew(tmp_path, widths):
    model = peft_model(tmp_path)
    expected = copy.deepcopy(model).get_base_model().model.layers[0].self_attn
    fuse_lora(model)
    found = model.get_base_model().model.layers[0].self_attn
    x, y = torch.randn(2, 1, 5, found.q_proj.in_features, generator=torch.Generator().manual_seed(3))
    for name, value in (("q_proj", x), ("k_proj", y), ("q_proj", y), ("q_proj", y), ("v_proj", x), ("k_proj", x)):
        assert torch.allclose(getattr(found, name)(value), getattr(expected, name)(value), atol=1e-6), name
    assert widths == [3] * 4  # q of x, then of y with its k, then again, and v of x with its k


def test_fast_lora_layers_of_other_inputs_under_such_names_compute_one_by_one(widths):
    """RWKV's feed-forward part has a `key` into its inner width and a `value` back."""
    from peft import LoraConfig, get_peft_model
    from transformers import RwkvConfig, RwkvForCausalLM

    sizes = {"hidden_size": 16, "attention_hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    base = RwkvForCausalLM(RwkvConfig(vocab_size=500, context_length=64, **sizes))
    stock = get_peft_model(
        base, LoraConfig(r=2, target_modules=r".*feed_forward\.(key|value)", init_lora_weights=False)
    )
    fused = copy.deepcopy(stock.train())
    assert fuse_lora(fused) == 4
    (expected, right), (found, grads) = step(stock), step(fused)
    assert widths == [1] * 4
    assert float(found) == pytest.approx(float(expected), rel=1e-6)
    assert all(torch.allclose(grad, right[name], rtol=1e-5, atol=1e-6) for name, grad in grads.items())


def test_fast_lora_encoder_decoders_compute_one_by_one(tmp_path, widths):
    """Their keys and values may be of the other side."""
    from peft import LoraConfig, get_peft_model
    from transformers import BartConfig, BartForConditionalGeneration

    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 500, "max_position_embeddings": 64}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    base = BartForConditionalGeneration(BartConfig(**sizes, **heads))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "k_proj", "v_proj"]))
    assert fuse_lora(model) == 9
    step(model)
    assert widths == [1] * 9


def test_fast_lora_under_autocast_rounds_like_peft(tmp_path):
    stock = peft_model(tmp_path)
    exact, _ = step(copy.deepcopy(stock))
    fused = copy.deepcopy(stock)
    fuse_lora(fused)
    (_, right), (found, grads) = step(stock, autocast=True), step(fused, autocast=True)
    assert float(found) == pytest.approx(float(exact), rel=1e-2) and float(found) != float(exact)
    for name, grad in grads.items():
        assert grad.dtype is torch.float32
        assert torch.linalg.norm(grad - right[name]) < 3e-2 * torch.linalg.norm(right[name]), name


def test_fast_lora_without_the_overwrite_is_the_same(tmp_path):
    model = peft_model(tmp_path)
    fuse_lora(model)
    (expected, right) = step(model)
    right = {name: grad.clone() for name, grad in right.items()}
    model.zero_grad()
    for module in model.modules():
        if hasattr(module, "overwrites_output"):
            module.overwrites_output = False
    found, grads = step(model)
    assert torch.equal(found, expected) and all(torch.allclose(grads[n], right[n], atol=1e-7) for n in right)


def test_a_disabled_adapter_is_the_base(tmp_path):
    stock = peft_model(tmp_path)
    fused = copy.deepcopy(stock)
    fuse_lora(fused)
    ids = torch.arange(10)[None]
    with torch.no_grad(), fused.disable_adapter():
        assert torch.equal(fused(input_ids=ids).logits, fused.get_base_model()(input_ids=ids).logits)
    with torch.no_grad():
        assert not torch.equal(fused(input_ids=ids).logits, stock.unload()(input_ids=ids).logits)


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"lora_dropout": 0.1}, {"lora_bias": True}])
def test_fast_lora_leaves_layers_that_do_more_to_peft(tmp_path, settings):
    assert fuse_lora(peft_model(tmp_path, **settings)) == 0


def test_fast_lora_leaves_transposed_bases_and_other_models_alone(tmp_path):
    assert fuse_lora(peft_model(tmp_path, "gpt2")) == 0
    assert fuse_lora(nn.Linear(2, 2)) == 0

"""Quantised experts: bitsandbytes' own numbers expert by expert, and the model of plain peft on a rounded base."""

import copy

import pytest
import torch

from tests.helpers.exports import assert_same_logits, export, logits_of, token_batch, trained
from tests.helpers.tokenizers import tiny_tokenizer
from tests.helpers.uncompiled import bitsandbytes
from tests.models.tiny import tiny_model
from tests.tuning.test_expert_lora_files import BOTH
from tests.tuning.test_quantised import SCHEMES, rounded_base, settings_of
from trainer.export.verify import probe_ids, reference_logits
from trainer.model import quantised_experts
from trainer.model.config import Quantisation
from trainer.model.quantised_experts import dequantise_experts, num_bytes, quantise_experts_slice, round_trip_experts
from trainer.tuning.base import LoraConfig

bnb = bitsandbytes()
parametrize = pytest.importorskip("bitsandbytes.nn.parametrize")
SHAPES = [(3, 64, 32), (2, 33, 7), (2, 160, 128)]
"""Rows are no whole blocks of 64, once of whole experts and once not; they are, with more scales than share one."""


def as_bitsandbytes(scheme, weight):
    """The stack with each expert as bitsandbytes' own parametrisation reads it."""
    made = []
    for expert in weight:
        if scheme.kind is Quantisation.int8:
            codes, scales, _ = bnb.functional.int8_vectorwise_quant(expert.half())
            made.append(codes.float() * (scales[:, None] * (1.0 / 127.0)))  # as its layer multiplies them
            continue
        holder = torch.nn.Module()
        holder.weight = torch.nn.Parameter(expert.clone())
        parametrize.replace_parameter_4bit(
            holder, "weight", compress_statistics=scheme.is_double_quantised, quant_type=str(scheme.kind), blocksize=64
        )
        made.append(holder.weight.detach())
    return torch.stack(made)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("shape", SHAPES)
def test_quantised_experts_are_those_of_bitsandbytes_in_any_part(name, shape):
    scheme = SCHEMES[name]
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    size, asked = num_bytes(scheme, shape), []

    def expert(number):
        asked.append(number)
        return weight[number]

    packed = quantise_experts_slice(scheme, shape, 0, size, expert)
    assert len(packed) == size and asked == list(range(shape[0]))
    expected = as_bitsandbytes(scheme, weight)
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(dequantise_experts(scheme, packed, shape, dtype), expected.to(dtype))
    assert torch.equal(round_trip_experts(scheme, weight), expected)
    assert 0 < (expected - weight).abs().max() < weight.abs().max()
    each = size // shape[0]
    for start, stop, needed in (
        (5, each, [0]),
        (each - 1, each + 1, [0, 1]),
        (each, each, []),
        (each, size, [*range(1, shape[0])]),
    ):
        asked.clear()
        assert torch.equal(quantise_experts_slice(scheme, shape, start, stop, expert), packed[start:stop])
        assert asked == needed


@pytest.mark.parametrize("name", SCHEMES)
def test_quantised_experts_beyond_the_counter_of_a_kernel_are_made_in_parts(monkeypatch, name):
    """bitsandbytes' kernels for GPUs count in 32 bits, and a layer of DeepSeek-V3 has seven times as many."""
    scheme, shape, sizes = SCHEMES[name], (5, 64, 128), []
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    packed = quantise_experts_slice(scheme, shape, 0, num_bytes(scheme, shape), lambda number: weight[number])
    whole, made = dequantise_experts(scheme, packed, shape, torch.float32), bnb.functional.dequantize_4bit

    def counted(codes, state):
        sizes.append(state.shape.numel())
        return made(codes, state)

    monkeypatch.setattr(bnb.functional, "dequantize_4bit", counted)
    monkeypatch.setattr(quantised_experts, "MAX_ELEMENTS_PER_CALL", 3 * 64 * 128 - 1)
    assert torch.equal(dequantise_experts(scheme, packed, shape, torch.float32), whole)
    assert sizes == ([] if scheme.kind is Quantisation.int8 else [2 * 64 * 128, 2 * 64 * 128, 64 * 128])


def test_quantised_experts_of_single_scales_are_those_of_the_weight_at_once():
    """Without double quantisation experts do not know of each other: one call for all of them is the same."""
    weight = torch.randn(3, 32, 64, generator=torch.Generator().manual_seed(2))
    holder = torch.nn.Module()
    holder.weight = torch.nn.Parameter(weight.clone())
    parametrize.replace_parameter_4bit(holder, "weight", quant_type="nf4", blocksize=64)
    assert torch.equal(round_trip_experts(SCHEMES["nf4 single"], weight), holder.weight.detach())


def plain_rounded(base, scheme):
    """The plain model with linear layers and experts rounded by bitsandbytes itself."""
    model = rounded_base(base, scheme)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".experts." in name and parameter.dim() == 3:
                parameter.copy_(as_bitsandbytes(scheme, parameter.detach()))
    return model


@pytest.mark.parametrize(
    ("architecture", "name"), [("mixtral", "nf4"), ("gpt_oss", "nf4"), ("gpt_oss", "int8"), ("qwen3_moe", "fp4")]
)
def test_an_adapter_on_quantised_experts_is_plain_pefts_on_a_rounded_base(bases, runtime, tmp_path, architecture, name):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base, scheme = bases(architecture), SCHEMES[name]
    parts = trained(base, LoraConfig(**BOTH), runtime, **settings_of(scheme))
    built, ids = parts[1], probe_ids(parts[2])
    assert (
        sum("experts" in key for key in built.quantised_shapes) == 4 and "model.quantisation" not in built.substitutions
    )
    reference = reference_logits(parts[0], built, ids, runtime)
    plain = plain_rounded(base, scheme)
    assert (logits_of(copy.deepcopy(plain), ids) - reference).abs().max() > 1e-3 * reference.abs().max()
    adapter = export(parts, base, tmp_path / "adapter", runtime, verify=True)
    assert_same_logits(logits_of(PeftModel.from_pretrained(plain, str(adapter)).eval(), ids), reference)
    merged = export(parts, base, tmp_path / "merged", runtime, merge=True, verify=True)
    assert_same_logits(logits_of(AutoModelForCausalLM.from_pretrained(merged).eval(), ids), reference)


def test_quantised_frozen_mixture_has_values_and_gradients_of_the_rounded_one(bases, runtime):
    """Attention alone is adapted: what reaches it has passed through the experts of the layers above."""
    import peft

    base, scheme = bases("gpt_oss"), SCHEMES["nf4"]
    engine, built, tokenizer = trained(base, LoraConfig(rank=4), runtime, steps=1, **settings_of(scheme))
    batch = token_batch(len(tokenizer), built.layout, 5)
    engine.backward(engine.forward(batch, last=True)["loss"], last=True)
    trains = {name: p for name, p in engine.step_module.model.named_parameters() if p.requires_grad}
    settings = peft.LoraConfig(r=4, lora_alpha=32, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    theirs = peft.get_peft_model(plain_rounded(base, scheme), settings)
    assert not theirs.load_state_dict({name: p.detach() for name, p in trains.items()}, strict=False).unexpected_keys
    ids = batch["input_ids"]
    labels = torch.full_like(ids, -100).index_copy_(
        1, batch["target_rows"] + 1, batch["targets"][:, batch["target_rows"]]
    )
    (theirs(input_ids=ids, labels=labels).loss * len(batch["target_rows"])).backward()
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            right = parameter.grad
            assert float((trains[name].grad - right).norm()) <= 1e-4 * float(right.norm()) > 0, name


def test_quantised_experts_with_a_computation_of_their_own_are_named(bases, runtime, tmp_path):
    model = tiny_model("jetmoe")
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    _, built, _ = trained(tmp_path, LoraConfig(rank=4), runtime, steps=0, **settings_of(SCHEMES["nf4"]))
    stacks = sum(p.numel() for p in model.parameters() if p.dim() == 3)  # its routers are linear layers
    assert {len(shape) for shape in built.quantised_shapes.values()} == {2}
    said = built.substitutions["model.quantisation"]
    assert f"{stacks:,} parameters" in said
    assert "mlp.input_linear.weight the largest" in said

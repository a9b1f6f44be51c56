"""Quantised bases: bitsandbytes' own numbers, the same model as plain peft on rounded weights, and exports that say so."""

from dataclasses import replace

import pytest
import torch

from launch.config.compose import compose_config
from strategies.base import Fsdp2Config, Precision, SingleConfig
from strategies.errors import ConfigError
from strategies.memory import estimated_state_bytes
from strategies.parameters import named_parameters, num_elements_by_name
from tests.helpers.exports import assert_same_logits, export, logits_of, trained
from tests.helpers.methods import ADAPTERS
from tests.helpers.models import tiny_model_dir
from tests.helpers.seq2seq import seq2seq_dir
from tests.helpers.tokenizers import tiny_tokenizer
from tests.helpers.uncompiled import bitsandbytes
from trainer.export.verify import DriftError, probe_ids, reference_logits, shift_right, verify_export
from trainer.model.config import Quantisation
from trainer.model.quantisation import QuantisationScheme, QuantisedLinear
from trainer.objectives.seq2seq import Seq2seqConfig
from trainer.tuning.base import LoraConfig
from trainer.tuning.table import method_of

bnb = bitsandbytes()
SCHEMES = {
    "nf4": QuantisationScheme(Quantisation.nf4, is_double_quantised=True),
    "nf4 single": QuantisationScheme(Quantisation.nf4, is_double_quantised=False),
    "fp4": QuantisationScheme(Quantisation.fp4, is_double_quantised=True),
    "int8": QuantisationScheme(Quantisation.int8),
}
WORKING = [name for name in ADAPTERS if "quantised" not in method_of(ADAPTERS[name][0]).refusal_by_property]
WORKING = [name for name in WORKING if "pissa" not in name and "olora" not in name]


def settings_of(scheme):
    return {"quantisation": scheme.kind, "double_quantisation": scheme.is_double_quantised}


def rounded_base(base, scheme, device="cpu"):
    """The plain model with its linear layers rounded by bitsandbytes itself."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base).eval()
    with torch.no_grad():
        for name, module in model.named_modules():
            if type(module) is torch.nn.Linear and name != "lm_head":
                if scheme.kind is Quantisation.int8:
                    int8 = bnb.nn.Int8Params(module.weight.detach(), requires_grad=False).to(device)
                    module.weight.copy_(bnb.functional.int8_vectorwise_dequant(int8.CB, int8.SCB))
                else:
                    packed = bnb.nn.Params4bit(
                        module.weight.detach(),
                        quant_type=str(scheme.kind),
                        compress_statistics=scheme.is_double_quantised,
                        requires_grad=False,
                    ).to(device)
                    module.weight.copy_(bnb.functional.dequantize_4bit(packed.data, packed.quant_state))
    return model


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("shape", [(64, 32), (33, 7), (300, 200)])
def test_quantised_numbers_are_those_of_bitsandbytes(name, shape):
    scheme = SCHEMES[name]
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    packed = scheme.quantise(weight)
    assert packed.dtype is torch.uint8
    assert len(packed) == scheme.num_bytes(shape)
    if scheme.kind is Quantisation.int8:
        theirs = bnb.nn.Int8Params(weight.clone(), requires_grad=False).to("cpu")
        expected = theirs.CB.float() * (theirs.SCB[:, None] * (1.0 / 127.0))
    else:
        theirs = bnb.nn.Params4bit(
            weight.clone(),
            quant_type=str(scheme.kind),
            compress_statistics=scheme.is_double_quantised,
            requires_grad=False,
        ).to("cpu")
        expected = bnb.functional.dequantize_4bit(theirs.data, theirs.quant_state)
    found = scheme.dequantise(packed, shape, torch.float32)
    assert torch.equal(found, expected)
    assert 0 < (found - weight).abs().max() < weight.abs().max()
    shifted = torch.cat([torch.zeros(3, dtype=torch.uint8), packed])[3:]  # as a part of a gathered buffer may lie
    assert torch.equal(scheme.dequantise(shifted, shape, torch.float32), expected)
    assert torch.equal(scheme.dequantise(packed, shape, torch.bfloat16), expected.bfloat16())


@pytest.mark.parametrize("name", SCHEMES)
def test_quantised_layer_has_values_and_gradients_of_a_plain_one_with_rounded_weights(name):
    scheme = SCHEMES[name]
    torch.manual_seed(0)
    plain = torch.nn.Linear(48, 40)
    layer = QuantisedLinear.of_linear(plain, scheme)
    layer.weight = torch.nn.Parameter(scheme.quantise(plain.weight.detach()), requires_grad=False)
    before = layer.weight.detach().clone()
    plain.weight.data = scheme.round_trip(plain.weight.detach())
    x, y = torch.randn(5, 48, requires_grad=True), torch.randn(5, 40)
    (ours,) = torch.autograd.grad((layer(x) * y).sum(), x)
    (theirs,) = torch.autograd.grad((plain(x) * y).sum(), x)
    torch.testing.assert_close(layer(x), plain(x), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    layer.eval()
    with torch.no_grad():
        layer(x.detach())
    assert torch.equal(layer.weight, before), "evaluation changed the bytes"


def test_quantised_layer_compiles_to_one_graph():
    """Parted where the codes' values are looked up, a block would be compiled anew for each length, and then no more."""
    plain = torch.nn.Linear(64, 32, bias=False)
    layer = QuantisedLinear.of_linear(plain, SCHEMES["nf4"])
    layer.weight = torch.nn.Parameter(SCHEMES["nf4"].quantise(plain.weight.detach()), requires_grad=False)
    x = torch.randn(3, 64, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    outs = [compute(x) for compute in (compiled, layer)]
    assert torch.equal(*outs)
    assert torch.equal(*(torch.autograd.grad(out.sum(), x)[0] for out in outs))
    torch.compiler.reset()


@pytest.mark.parametrize("name", SCHEMES)
def test_quantised_model_is_the_one_that_transformers_loads(name, base, runtime):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    scheme = SCHEMES[name]
    quantised = {"load_in_8bit": True}
    if scheme.kind is not Quantisation.int8:
        quantised = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": str(scheme.kind),
            "bnb_4bit_use_double_quant": scheme.is_double_quantised,
        }
    config = BitsAndBytesConfig(**quantised, bnb_4bit_compute_dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(base, quantization_config=config, dtype=torch.float32)
    theirs.train()  # in eval mode their 8-bit layer rounds activations, and their 4-bit layer computes in bf16 on CPUs
    engine, built, tokenizer = trained(base, LoraConfig(rank=4), runtime, steps=0, **settings_of(scheme))
    ids = probe_ids(tokenizer)
    reference = reference_logits(engine, built, ids, runtime)
    assert_same_logits(reference, logits_of(theirs, ids))
    names = {f"{n}.weight" for n, m in theirs.named_modules() if type(m) in (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)}
    assert names == set(built.quantised_shapes)


@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_quantised_model_keeps_the_modules_in_float32_that_transformers_keeps(name, tmp_path, runtime):
    """T5's `wo` converts activations to the type of its stored weight, which would be bytes."""
    from transformers import AutoModelForSeq2SeqLM, BitsAndBytesConfig

    scheme, directory = SCHEMES[name], seq2seq_dir(tmp_path)
    quantised = {"load_in_8bit": True} if name == "int8" else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    if name == "nf4":
        quantised |= {"bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.float32}
    config = BitsAndBytesConfig(**quantised)
    theirs = AutoModelForSeq2SeqLM.from_pretrained(
        directory, quantization_config=config, dtype=torch.float32, dropout_rate=0
    )
    objective = Seq2seqConfig(max_target=16)
    engine, built, tokenizer = trained(
        directory, LoraConfig(rank=4), runtime, steps=0, objective=objective, **settings_of(scheme)
    )
    names = {f"{n}.weight" for n, m in theirs.named_modules() if type(m) in (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)}
    assert names == set(built.quantised_shapes) and not [n for n in names if ".wo." in n]
    logits = reference_logits(engine, built, probe_ids(tokenizer), runtime)
    ids = torch.tensor([probe_ids(tokenizer)])
    theirs.train()
    with torch.no_grad():
        expected = theirs(
            input_ids=ids, decoder_input_ids=shift_right(ids, built.encoder_decoder.decoder_start)
        ).logits[0]
    assert_same_logits(logits, expected)


@pytest.mark.parametrize("name", WORKING)
def test_a_method_computes_as_plain_peft_on_rounded_weights(name, base, runtime, tmp_path):
    from peft import PeftModel

    scheme = SCHEMES["nf4"]
    parts = trained(base, ADAPTERS[name][0], runtime, **settings_of(scheme))
    ids = probe_ids(parts[2])
    reference = reference_logits(parts[0], parts[1], ids, runtime)
    plain = rounded_base(base, scheme)
    assert (logits_of(plain, ids) - reference).abs().max() > 1e-3 * reference.abs().max()
    adapter = export(parts, base, tmp_path / "adapter", runtime, verify=True)
    assert_same_logits(logits_of(PeftModel.from_pretrained(plain, str(adapter)).eval(), ids), reference)
    if method_of(ADAPTERS[name][0]).merge_refusal:
        return
    from transformers import AutoModelForCausalLM

    merged = export(parts, base, tmp_path / "merged", runtime, merge=True, verify=True)
    assert_same_logits(logits_of(AutoModelForCausalLM.from_pretrained(merged).eval(), ids), reference)


def test_verification_sees_an_adapter_on_the_wrong_base(base, runtime, tmp_path):
    scheme = SCHEMES["nf4"]
    parts = trained(base, LoraConfig(rank=4), runtime, **settings_of(scheme))
    adapter = export(parts, base, tmp_path / "adapter", runtime)
    ids = probe_ids(parts[2])
    reference = reference_logits(parts[0], parts[1], ids, runtime)
    with pytest.raises(DriftError):
        verify_export(adapter, base_path=str(base), token_ids=ids, reference=reference)
    verify_export(
        adapter, base_path=str(base), token_ids=ids, reference=reference, quantised_base=parts[1].base_weights(base)
    )


def test_quantised_model_counts_elements_and_stores_fewer_bytes(base, runtime):
    whole = trained(base, LoraConfig(rank=4), runtime, steps=0)
    packed = trained(base, LoraConfig(rank=4), runtime, steps=0, **settings_of(SCHEMES["nf4"]))
    counts = [num_elements_by_name(parts[0].step_module) for parts in (whole, packed)]
    assert counts[0] == counts[1]
    held = [
        sum(p.nbytes for n, p in named_parameters(parts[0].step_module) if n.endswith("base_layer.weight"))
        for parts in (whole, packed)
    ]
    assert held[0] / held[1] > 6.5  # 32 bits to 4.13, and 4 bytes a matrix


def test_half_precision_is_near(base, runtime):
    """bf16 rounds products, not weights again: the curve stays within what bf16 does to a plain base."""
    scheme = SCHEMES["nf4"]
    logits = []
    for precision in (Precision.fp32, Precision.bf16):
        engine, built, tokenizer = trained(
            base, LoraConfig(rank=4), runtime, steps=0, precision=precision, **settings_of(scheme)
        )
        logits.append(reference_logits(engine, built, probe_ids(tokenizer), runtime).float())
    assert 0 < (logits[0] - logits[1]).abs().max() < 0.03 * logits[0].abs().max()


def test_a_model_without_linear_layers_is_refused(tmp_path, runtime):
    tiny_model_dir(tmp_path, "gpt2")
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="no linear layers of the kind"):
        trained(tmp_path, LoraConfig(rank=4), runtime, steps=0, **settings_of(SCHEMES["nf4"]))


def test_modules_that_train_in_full_are_not_quantised(base, runtime):
    config = replace(LoraConfig(rank=4), targets=["q_proj"], modules_to_save=["down_proj"])
    engine, built, _ = trained(base, config, runtime, **settings_of(SCHEMES["nf4"]))
    assert not [name for name in built.quantised_shapes if "down_proj" in name]
    assert [n for n, p in named_parameters(engine.step_module) if p.requires_grad and "down_proj" in n]


def test_quantised_memory_estimate_counts_bytes(base, runtime):
    gathered = {}
    for kind, settings in (("plain", {}), ("nf4", settings_of(SCHEMES["nf4"]))):
        engine, _, _ = trained(base, LoraConfig(rank=4), runtime, steps=0, **settings)
        parameters = [p for _, p in named_parameters(engine.step_module)]
        stored = sum(p.nbytes for p in parameters)
        moving = sum(p.numel() * (4 + 8) for p in parameters if p.requires_grad)  # gradients, and moments of AdamW
        state = {
            type(strategy): estimated_state_bytes(
                engine.step_module, strategy, Precision.fp32, world_size=2, num_replicas=1
            )
            for strategy in (SingleConfig(), Fsdp2Config())
        }
        assert state[SingleConfig] == stored + moving
        gathered[kind] = state[Fsdp2Config] - (stored + moving) / 2
    assert 0 < gathered["nf4"] < gathered["plain"]


@pytest.fixture
def words(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "train.jsonl").write_text("{}\n")
    return [
        "optim.lr=1e-4",
        f"model.path={base}",
        "data.path=train.jsonl",
        "budget.steps=1",
        "run.device=cpu",
        "model.quantisation=nf4",
    ]


@pytest.mark.parametrize(
    ("typed", "part"),
    [
        ("tuning=full", "model.quantisation=nf4 with tuning=full: it trains the base weights"),
        ("tuning=freeze tuning.layers=last-1", "with tuning=freeze: it trains the base weights"),
        ("tuning=lora tuning.dora=true", "DoRA needs the norms of the base weights"),
        ("tuning=lora tuning.init=pissa", "would be rounded anew"),
        ("tuning=lokr", "with tuning=lokr: peft reads the base weight, or its shape"),
        ("tuning=peft tuning.type=hra", "with tuning.type=hra: peft reads the base weight, or its shape"),
    ],
)
def test_quantised_base_refuses_methods_that_cannot_stand_on_it(words, typed, part):
    with pytest.raises(ConfigError) as caught:
        compose_config([*words, *typed.split()])
    assert part in str(caught.value)
    compose_config([word for word in [*words, *typed.split()] if not word.startswith("model.quantisation")])


def test_every_refused_method_would_fail(base, runtime):
    """A method that began to work would be refused for nothing."""
    for config, _, _ in ADAPTERS.values():
        if "quantised" in method_of(config).refusal_by_property:
            with pytest.raises((RuntimeError, IndexError)):
                trained(base, config, runtime, steps=1, **settings_of(SCHEMES["nf4"]))


def test_the_error_names_the_extra(words, monkeypatch):
    monkeypatch.setattr("trainer.model.rules.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install -e '\.\[qlora\]'"):
        compose_config([*words, "tuning=lora"])

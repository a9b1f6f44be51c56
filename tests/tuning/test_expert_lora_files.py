"""Adapters of experts and routers as files: plain peft loads them, and the merged model is what was trained."""

from dataclasses import replace

import pytest
import torch
import transformers

from strategies.parameters import named_parameters
from tests.helpers.exports import assert_same_logits, export, logits_of, plain_base, trained
from tests.helpers.tokenizers import tiny_tokenizer
from tests.tuning.test_expert_lora import CONFIGS
from trainer.export.verify import probe_ids, reference_logits
from trainer.tuning.base import LoraConfig
from trainer.tuning.initial_adapter import adopt_adapter_settings, continuation_problems

BOTH = {"rank": 4, "experts": True, "router": True}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Model directories with a tokenizer, made once an architecture."""
    made = {}

    def base(architecture):
        if architecture not in made:
            path = made[architecture] = tmp_path_factory.mktemp(architecture)
            torch.manual_seed(0)
            config = CONFIGS[architecture]()
            config.vocab_size, config.pad_token_id = 512, 2
            model = transformers.AutoModelForCausalLM.from_config(config)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.dim() > 1:
                        parameter.normal_(0, 0.1)
            model.save_pretrained(path)
            tiny_tokenizer().save_pretrained(path)
        return made[architecture]

    return base


def peft_on(base, adapter):
    from peft import PeftModel

    return PeftModel.from_pretrained(plain_base(base), str(adapter)).eval()


@pytest.mark.parametrize("architecture", CONFIGS)
@pytest.mark.parametrize("settings", [{}, {"targets": []}])
def test_an_adapter_loads_with_plain_peft_and_equals_its_merge(architecture, settings, bases, runtime, tmp_path):
    base = bases(architecture)
    parts = trained(base, LoraConfig(**BOTH, **settings), runtime)
    ids = probe_ids(parts[2])
    adapter = export(parts, base, tmp_path / "adapter", runtime, verify=True)
    merged = export(parts, base, tmp_path / "merged", runtime, merge=True, verify=True)
    reference = reference_logits(parts[0], parts[1], ids, runtime)
    assert (logits_of(plain_base(base), ids) - reference).abs().max() > 1e-3 * reference.abs().max()
    assert_same_logits(logits_of(peft_on(base, adapter), ids), reference)
    assert_same_logits(logits_of(plain_base(merged), ids), reference)


def test_expert_lora_on_attention_alone_stays_so_under_plain_peft(bases, runtime, tmp_path):
    """peft takes `gate_proj` of a dense layer or a shared expert for experts of old, and would draw adapters for them."""
    base = bases("qwen2_moe")
    parts = trained(base, LoraConfig(rank=4), runtime)
    adapter = export(parts, base, tmp_path / "adapter", runtime, verify=True)
    loaded = peft_on(base, adapter)
    ours = {n for n, p in named_parameters(parts[0].step_module) if p.requires_grad}
    assert {n for n, _ in loaded.named_parameters() if ".lora_" in n} == ours
    assert not any(".experts." in name for name in ours)


def test_expert_lora_training_goes_on_from_an_adapter(bases, runtime, tmp_path):
    base = bases("qwen2_moe")
    parts = trained(base, LoraConfig(**BOTH), runtime)
    adapter = export(parts, base, tmp_path / "adapter", runtime)
    ids = probe_ids(parts[2])
    follows = LoraConfig(from_=str(adapter))
    assert adopt_adapter_settings(follows, set())["tuning.experts"] == "False -> True (of tuning.from)"
    assert follows.experts and follows.router and not list(continuation_problems(follows))
    assert any(name.endswith("shared_expert.up_proj") for name in follows.targets)
    (problem,) = continuation_problems(replace(follows, router=False))
    assert "tuning.router=True" in problem
    again = trained(base, follows, runtime, steps=0)
    reference = reference_logits(parts[0], parts[1], ids, runtime)
    assert_same_logits(reference_logits(again[0], again[1], ids, runtime), reference)


def test_expert_lora_is_folded_into_the_base_as_it_is_read(bases, runtime, tmp_path):
    base = bases("gpt_oss")
    parts = trained(base, LoraConfig(**BOTH), runtime)
    adapter = export(parts, base, tmp_path / "adapter", runtime)
    ids = probe_ids(parts[2])
    folded = trained(base, LoraConfig(rank=4), runtime, steps=0, adapters=[str(adapter)])
    reference = reference_logits(parts[0], parts[1], ids, runtime)
    assert_same_logits(reference_logits(folded[0], folded[1], ids, runtime), reference)


def test_expert_lora_starts_as_peft_draws_and_by_the_seed_alone(bases, runtime):
    import peft

    base = bases("mixtral")
    first, second = (trained(base, LoraConfig(**BOTH), runtime, steps=0) for _ in range(2))
    ours, again = (dict(named_parameters(parts[0].step_module)) for parts in (first, second))
    settings = peft.LoraConfig(
        r=4, target_modules=["q_proj"], target_parameters=["gate.weight", "experts.gate_up_proj", "experts.down_proj"]
    )
    theirs = dict(peft.get_peft_model(plain_base(base), settings).named_parameters())
    seen = 0
    for name, parameter in theirs.items():
        if ".lora_" in name and ".mlp." in name:
            assert torch.equal(ours[name], again[name]), name
            assert ours[name].shape == parameter.shape
            assert ours[name].std().item() == pytest.approx(parameter.std().item(), rel=0.35), name
            seen += 1
    assert seen == 2 * 3 * 2

"""Every method computes what plain peft computes, and its export loads and merges to the same logits."""

import pytest
import torch

from strategies.parameters import named_parameters
from tests.helpers.exports import assert_same_logits, export, logits_of, plain_base, trained
from tests.helpers.methods import ADAPTERS, FROZEN
from trainer.export.config import ExportConfig
from trainer.export.verify import probe_ids, reference_logits
from trainer.tuning.base import LoraConfig
from trainer.tuning.table import method_of


def plain_peft(base, name):
    """The base under plain peft, in the setting of the case."""
    import peft

    _, class_name, options = ADAPTERS[name]
    torch.manual_seed(3)
    settings = getattr(peft, class_name)(**{"target_modules": "all-linear", **options})
    return peft.get_peft_model(plain_base(base), settings)


def exact_logits(model, ids):
    """What the stored weights mean, in float64.

    OLoRA's start takes sixteen times a factor out of the base and adds it again: two float32 sums that nearly cancel, whose
    rounding is 8e-6 of the largest logit on one processor and 1e-5 on another. In float64 only the rounding of the
    stored weights is left, below 2e-6 everywhere.
    """
    with torch.no_grad():
        return model.double()(input_ids=torch.tensor([ids])).logits[0]


def exact_logits_of_trained(parts, ids, runtime):
    """The same of the tuned model; it stays in float64."""
    engine, built, _ = parts
    with engine.inference() as step:
        step.double()
    return reference_logits(engine, built, ids, runtime)


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_starts_and_computes_as_under_plain_peft(name, base, runtime):
    config = ADAPTERS[name][0]
    engine, built, tokenizer = trained(base, config, runtime, steps=0)
    model = plain_peft(base, name)
    theirs, ours = dict(model.named_parameters()), dict(named_parameters(engine.step_module))
    assert {n: p.shape for n, p in theirs.items()} == {n: p.shape for n, p in ours.items()}
    assert {n for n, p in theirs.items() if p.requires_grad} == {n for n, p in ours.items() if p.requires_grad}
    for key, parameter in theirs.items():
        if not parameter.requires_grad and "niter" not in name:  # also what PiSSA and OLoRA leave of the base
            torch.testing.assert_close(ours[key], parameter, rtol=0, atol=1e-6)
        elif parameter.numel() > 100 and parameter.std() > 0:  # drawn from another seed: alike, not equal
            assert ours[key].std().item() == pytest.approx(parameter.std().item(), rel=0.35), key
            assert abs(ours[key].mean() - parameter.mean()) < 0.35 * parameter.std(), key
        elif "niter" not in name and parameter.std() == 0:
            assert torch.equal(ours[key], parameter), key

    with torch.no_grad():
        generator = torch.Generator().manual_seed(5)
        for key, parameter in theirs.items():
            if parameter.requires_grad:  # away from the start, where most methods compute what the base does
                value = ours[key] + torch.randn(parameter.shape, generator=generator) * 0.05
                parameter.copy_(value)
                ours[key].copy_(value)
            else:
                parameter.copy_(ours[key])
    ids = probe_ids(tokenizer)
    reference = exact_logits(model.eval(), ids)
    assert (exact_logits(plain_base(base), ids) - reference).abs().max() > 1e-3 * reference.abs().max()
    assert_same_logits(exact_logits_of_trained((engine, built, tokenizer), ids, runtime), reference)


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_exported_adapter_loads_with_plain_peft_and_equals_its_merge(name, base, runtime, tmp_path):
    from peft import PeftModel

    config = ADAPTERS[name][0]
    parts = trained(base, config, runtime)
    ids = probe_ids(parts[2])
    adapter = export(parts, base, tmp_path / "adapter", runtime, verify=True)
    if not method_of(config).merge_refusal:
        merged = export(parts, base, tmp_path / "merged", runtime, merge=True, verify=True)
    reference = exact_logits_of_trained(parts, ids, runtime)
    unadapted = exact_logits(plain_base(base), ids)
    assert (unadapted - reference).abs().max() > 1e-3 * reference.abs().max()
    assert_same_logits(exact_logits(PeftModel.from_pretrained(plain_base(base), str(adapter)).eval(), ids), reference)
    if method_of(config).merge_refusal:
        return
    assert_same_logits(exact_logits(plain_base(merged), ids), reference)
    assert ExportConfig(merge=True).merge


@pytest.mark.parametrize("name", FROZEN)
def test_a_partly_frozen_model_is_exported_whole(name, base, runtime, tmp_path):
    from safetensors.torch import load_file

    parts = trained(base, FROZEN[name], runtime)
    trains = {n for n, p in named_parameters(parts[0].step_module) if p.requires_grad}
    whole = export(parts, base, tmp_path / "whole", runtime, verify=True)
    ours, theirs = load_file(whole / "model.safetensors"), load_file(base / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert torch.equal(ours[key], tensor) == (key not in trains), key
    ids = probe_ids(parts[2])
    assert_same_logits(logits_of(plain_base(whole), ids), reference_logits(parts[0], parts[1], ids, runtime))


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_lora_start_from_the_base_weights_is_that_of_peft(init, base, runtime):
    """The factors are unique up to the sign of each direction, which both take from the same routine."""
    engine, _, _ = trained(base, LoraConfig(rank=4, init=init, alpha=8.0), runtime, steps=0)
    import peft

    model = peft.get_peft_model(
        plain_base(base),
        peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights=init, target_modules="all-linear"),
    )
    theirs = dict(model.named_parameters())
    for key, parameter in named_parameters(engine.step_module):
        torch.testing.assert_close(parameter, theirs[key], rtol=1e-5, atol=1e-6)

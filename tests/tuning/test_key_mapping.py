"""Adapters of models whose names in the checkpoint are others: stored so that plain peft finds each tensor again."""

import pytest
import torch
import transformers

from strategies.errors import ConfigError
from strategies.parameters import meta_context
from tests.models import tiny
from trainer.tuning.adapter import Adapter
from trainer.tuning.adapter_checkpoint import StoredAdapter
from trainer.tuning.adapter_files import write_adapter
from trainer.tuning.base import LoraConfig
from trainer.tuning.key_mapping import check_adapters_loadable


def adapted(model_type, **settings):
    """(plain model on meta, wrapped; what is said of its targets)."""
    with meta_context():
        model = transformers.AutoModelForCausalLM.from_config(tiny.tiny_config(model_type))
    tuning = Adapter(LoraConfig(rank=2, **settings))
    return tuning.apply(model), tuning.note


def test_adapter_key_mapping_lets_plain_peft_read_renamed_layers(tmp_path):
    from peft import PeftModel

    tuned, _ = adapted("laguna")
    draw = torch.Generator().manual_seed(5)
    trained = {n: torch.randn(p.shape, generator=draw) for n, p in tuned.named_parameters() if ".lora_" in n}
    assert any(".shared_experts." in name for name in trained)
    check_adapters_loadable(tuned)
    write_adapter(tuned, trained, tmp_path, "base", None)
    plain = dict(PeftModel.from_pretrained(tiny.tiny_model("laguna"), str(tmp_path)).named_parameters())
    for name, value in trained.items():
        assert torch.equal(plain[name], value), name
    stored = StoredAdapter(tmp_path, "tuning.from")
    stored.match_names(tuned)
    assert all(torch.equal(stored.tensor(name), value) for name, value in trained.items())


def test_adapter_key_mapping_leaves_out_or_refuses_layers_that_no_key_leads_to():
    tuned, note = adapted("inkling2_text")
    assert not any("weight_proj" in name for name, _ in tuned.named_parameters() if ".lora_" in name)
    assert note == "all-linear but for weight_proj (peft would not read its adapter back)"
    check_adapters_loadable(tuned)
    asked, note = adapted("inkling2_text", targets=["weight_proj"])
    assert note.startswith("['weight_proj']: reaches 2% of the weights of linear layers")
    with pytest.raises(ConfigError, match=r"weight_proj back, under whatever key.*export.merge=true"):
        check_adapters_loadable(asked)


def test_adapter_leaves_out_a_layer_whose_weight_is_used_directly():
    tuned, note = adapted("gemma3n_text")
    names = {name for name, _ in tuned.named_parameters() if ".lora_" in name}
    assert not any("correction_coefs" in name for name in names) and any("q_proj" in name for name in names)
    assert note == "all-linear but for correction_coefs (the model takes the weight past the layer)"
    assert not adapted("bloom")[1]  # slices of a weight, for tensor parallelism, are not that

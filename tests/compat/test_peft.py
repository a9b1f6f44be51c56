"""What the project uses of peft beside its public interface still does what it is used for."""

import subprocess
import sys

import pytest
import torch
import transformers
from torch import nn

from trainer.tuning.compat import peft as compat

SIZES = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


def qwen3_moe():
    """A model with a dense layer, and experts that were linear layers in transformers 4."""
    config = transformers.Qwen3MoeConfig(
        **SIZES,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        mlp_only_layers=[0],
    )
    return transformers.AutoModelForCausalLM.from_config(config)


def llama():
    return transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SIZES))


def lora(model, **settings):
    peft = compat.load_peft()
    return peft.get_peft_model(model, peft.LoraConfig(r=2, init_lora_weights=False, **settings))


def adapted_names(model):
    return {name.split(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A." in name}


def test_nothing_is_compiled_while_peft_is_imported():
    """What happens at a function's first call is in tests/tuning/test_loading.py."""
    script = """
import gc
import torch
from trainer.tuning.compat import peft as compat
compiled = []
torch.compile = lambda function=None, **settings: compiled.append(function) or (function or (lambda made: made))
compat.load_peft()
assert not [each for each in compiled if each is None or each.__module__.startswith(("peft", "bitsandbytes"))], compiled
assert gc.isenabled() and gc.get_freeze_count() == 0, "the model that gets an adapter would never be freed"
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_peft_adapts_only_the_named_modules():
    """Without the patch peft 0.21 takes a dense layer's `down_proj` for the experts of transformers 4."""
    dense = "base_model.model.model.layers.0.mlp.down_proj"
    with compat.without_target_renaming():
        assert adapted_names(lora(qwen3_moe(), target_modules=["down_proj"])) == {dense}


def test_peft_names_read_as_experts_are_those_it_converts():
    assert {"gate_proj", "up_proj", "down_proj"} <= compat.names_read_as_experts("qwen3_moe")
    assert compat.names_read_as_experts("mixtral")
    assert compat.names_read_as_experts("llama") == frozenset()


def test_peft_renamed_adapter_keys_are_told_from_kept_ones():
    """The keys are compared with what `PeftModel.from_pretrained` finds in a file."""
    base = llama()
    tuned = lora(base, target_modules=["q_proj"])
    prefix = "base_model.model."
    kept = f"{prefix}model.layers.0.self_attn.q_proj.lora_A.weight"
    renamed = f"{prefix}language_model.model.layers.0.self_attn.q_proj.lora_A.weight"
    settings = tuned.peft_config["default"]
    assert compat.loaded_key_by_stored_key(tuned, settings, [kept], "default") == {kept: kept}
    # A LLaVA stores its language model under another name than it has in the model.
    config = transformers.LlavaConfig(
        text_config={"model_type": "llama", **SIZES},
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "intermediate_size": 48,
        },
    )
    seeing = lora(transformers.AutoModelForMultimodalLM.from_config(config), target_modules=r".*language_model.*q_proj")
    found = compat.loaded_key_by_stored_key(seeing, seeing.peft_config["default"], [renamed], "default")
    assert found == {renamed: f"{prefix}model.language_model.layers.0.self_attn.q_proj.lora_A.weight"}


def test_peft_adapters_are_switched_off_for_a_while_and_keep_requires_grad():
    base = llama().eval()
    ids = torch.arange(12)[None]
    with torch.no_grad():
        without = base(input_ids=ids).logits
        tuned = lora(base, target_modules=["q_proj"], modules_to_save=["lm_head"])
        trained = {name for name, parameter in tuned.named_parameters() if parameter.requires_grad}
        head = next(p for name, p in tuned.named_parameters() if "lm_head.modules_to_save" in name)
        head.add_(1.0)
        with_adapter = tuned(input_ids=ids).logits
        with compat.adapters_off(tuned):
            off = tuned(input_ids=ids).logits
            asked = {name for name, parameter in tuned.named_parameters() if parameter.requires_grad}
        on_again = tuned(input_ids=ids).logits
    assert torch.equal(off, without) and asked == trained
    assert not torch.allclose(with_adapter, without) and torch.equal(on_again, with_adapter)


def test_peft_stores_modules_trained_in_full_as_the_same_tensors():
    """For LoRA, where the public function needs no forward pass of the model, both give the same tensors."""
    from peft import get_peft_model_state_dict

    tuned = lora(llama(), target_modules=["q_proj"], modules_to_save=["lm_head"])
    trained = {name: p.detach() for name, p in tuned.named_parameters() if p.requires_grad}
    stored = compat.peft_tensors_of_fully_trained_modules(tuned, trained, "default")
    by_peft = get_peft_model_state_dict(tuned, state_dict=trained, save_embedding_layers=False)
    assert {key: value for key, value in by_peft.items() if "lora_" not in key}.keys() == stored.keys() != set()
    assert all(torch.equal(stored[key], by_peft[key]) for key in stored)


@pytest.mark.parametrize("config_class", [transformers.LlamaConfig, transformers.GPT2Config])
def test_attention_that_peft_wraps_for_llama_adapter_is_known(config_class):
    peft = compat.load_peft()
    sizes = (
        SIZES
        if config_class is transformers.LlamaConfig
        else {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4}
    )
    model = transformers.AutoModelForCausalLM.from_config(config_class(**sizes))
    settings = peft.AdaptionPromptConfig(adapter_len=2, adapter_layers=2, task_type="CAUSAL_LM")
    tuned = peft.get_peft_model(model, settings)
    adapted = [name for name, module in tuned.named_modules() if compat.is_adapted_attention(module)]
    assert len(adapted) == 2 and all(name.endswith("attn") for name in adapted), adapted


def test_peft_embeddings_beside_virtual_tokens_are_one_module_that_peft_still_has():
    peft = compat.load_peft()
    model = llama()
    embeddings = model.get_input_embeddings()
    tuned = peft.get_peft_model(model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))

    def names(tree: nn.Module) -> list[str]:
        return [name for name, module in tree.named_modules(remove_duplicate=False) if module is embeddings]

    compat.detach_word_embeddings(tuned)
    assert names(tuned) == ["base_model.model.embed_tokens"]
    assert tuned.word_embeddings is embeddings
    assert tuned(input_ids=torch.arange(5)[None]).logits.shape == (1, 8, 96)


def test_peft_takes_ia3_targets_of_an_architecture_whose_feedforward_it_does_not_know():
    peft = compat.load_peft()
    with pytest.raises(ValueError, match="feedforward_modules"):
        peft.get_peft_model(qwen3_moe(), peft.IA3Config(target_modules=["k_proj", "v_proj"]))
    settings = peft.IA3Config(target_modules=["k_proj", "v_proj"])
    compat.scale_outputs_if_architecture_unknown(settings, "qwen3_moe")
    trained = [name for name, p in peft.get_peft_model(qwen3_moe(), settings).named_parameters() if p.requires_grad]
    assert len(trained) == 2 * SIZES["num_hidden_layers"] and all("ia3" in name for name in trained)
    compat.scale_outputs_if_architecture_unknown(known := peft.IA3Config(target_modules=["k_proj"]), "llama")
    assert known.feedforward_modules is None

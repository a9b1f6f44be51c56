"""Virtual tokens of an export, on another device than the one that their model was loaded on."""

import json

import pytest
import torch
import transformers
from safetensors.torch import save_file

from trainer.tuning import virtual

WIDTH, LAYERS, HEADS, TOKENS = 16, 2, 2, 3


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "PREFIX_TUNING"])
def test_virtual_tokens_go_where_their_model_is_moved(tmp_path, kind):
    """They are no part of it: on a GPU they would stay on the host. The device here has shapes alone, and mixes with none."""
    sizes = {"hidden_size": WIDTH, "intermediate_size": 16, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
    config = transformers.LlamaConfig(vocab_size=32, attn_implementation="eager", **sizes)  # which looks at no values
    model = transformers.LlamaForCausalLM(config)
    width = WIDTH if kind == "PROMPT_TUNING" else LAYERS * 2 * WIDTH
    save_file({"prompt_embeddings": torch.randn(TOKENS, width)}, tmp_path / "adapter_model.safetensors")
    told = {"peft_type": kind, "num_virtual_tokens": TOKENS, "num_layers": LAYERS, "num_attention_heads": HEADS}
    (tmp_path / "adapter_config.json").write_text(json.dumps(told))
    loaded, ids = virtual.load(model, tmp_path), torch.arange(5)[None]
    with torch.no_grad():
        assert loaded(ids, attention_mask=torch.ones_like(ids), use_cache=False).logits.shape == (1, 5, 32)
        ids = ids.to("meta")
        logits = loaded.to("meta")(ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    assert logits.is_meta and logits.shape == (1, 5, 32)

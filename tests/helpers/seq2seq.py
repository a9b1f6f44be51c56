"""Tiny random encoder-decoder models of each proven class, saved as ordinary Hugging Face directories."""

import json
from pathlib import Path

import torch

from tests.helpers.tokenizers import tiny_tokenizer

_T5 = {"d_model": 32, "d_ff": 64, "num_layers": 2, "num_heads": 4, "d_kv": 8}
_BART = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "max_position_embeddings": 128,
}
CONFIGS = {
    "t5": ("T5Config", _T5),
    "t5_untied": ("T5Config", {**_T5, "tie_word_embeddings": False, "feed_forward_proj": "gated-gelu"}),  # as Flan-T5
    "mt5": ("MT5Config", _T5),
    "umt5": ("UMT5Config", _T5),
    "bart": ("BartConfig", {**_BART, "decoder_layerdrop": 0.5}),
    "pegasus": ("PegasusConfig", {**_BART, "scale_embedding": True}),
    "marian": ("MarianConfig", {**_BART, "scale_embedding": True}),
}


def seq2seq_dir(root: Path, architecture: str = "t5") -> Path:
    """A random model of about 60,000 parameters with a tokenizer; made once.

    The bias of the logits of BART's kin is not zero, and the untied T5's config.json is written as those of the hub.
    """
    path = root / architecture
    if (path / "tokenizer.json").exists():
        return path
    import transformers

    name, extra = CONFIGS[architecture]
    tokenizer = tiny_tokenizer(None)
    special = {"pad_token_id": 2, "bos_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 2}
    config = getattr(transformers, name)(**{"vocab_size": len(tokenizer) + 10, **special, **extra})
    torch.manual_seed(0)
    model = transformers.AutoModelForSeq2SeqLM.from_config(config)
    if architecture == "t5_untied":
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.lm_head.weight))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and parameter.requires_grad:
                parameter.normal_(0, 0.1)
        if hasattr(model, "final_logits_bias"):
            model.final_logits_bias.normal_(0, 0.5)
            model.final_logits_bias[0, 1] = 2.0  # some answers end early, and some do not
    model.save_pretrained(path)
    if architecture == "t5_untied":
        settings = json.loads((path / "config.json").read_text())
        settings.pop("scale_decoder_outputs")
        (path / "config.json").write_text(json.dumps({**settings, "tie_word_embeddings": False}))
    tokenizer.save_pretrained(path)
    return path

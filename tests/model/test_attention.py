"""Padding-free rows equal separate documents, for every architecture that is trusted with them."""

import copy
import itertools

import pytest
import torch

from tests.helpers.models import tiny_model_dir
from trainer.heads.loss import LossHead, head_transform
from trainer.model import attention

LENGTHS = (7, 40, 1, 21)
ARCHITECTURES = (
    "gemma",
    "gemma2",
    "gemma3_text",
    "gpt2",
    "gpt_neox",
    "gpt_oss",
    "llama",
    "mistral",
    "phi3",
    "qwen2",
    "qwen3",
)


def documents():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 500, (n,), generator=generator) for n in LENGTHS]


def concatenated(documents):
    bounds = [0, *itertools.accumulate(len(d) for d in documents)]
    boundaries = torch.tensor(bounds, dtype=torch.int32)
    return {
        "input_ids": torch.cat(documents)[None],
        "position_ids": torch.cat([torch.arange(len(d)) for d in documents])[None],
        "cu_seq_lens_q": boundaries,
        "cu_seq_lens_k": boundaries,
        "max_length_q": max(LENGTHS),
        "max_length_k": max(LENGTHS),
        "use_cache": False,
    }


@pytest.fixture(params=ARCHITECTURES)
def pair(request, tmp_path):
    """The stock model (eager attention) and the same weights with ours."""
    from transformers import AutoConfig, AutoModelForCausalLM

    attention.register()
    path = tiny_model_dir(tmp_path, request.param)
    stock = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()
    config = copy.deepcopy(AutoConfig.from_pretrained(path))
    ours = AutoModelForCausalLM.from_config(config, attn_implementation=attention.NAME).eval()
    ours.load_state_dict(stock.state_dict())
    return stock, ours


def test_concatenated_equals_separate(pair):
    """Values and gradients, and the fused loss with its soft cap, against the stock model's own."""
    stock, ours = pair
    docs = documents()
    losses = []
    for ids in docs:
        logits = stock(input_ids=ids[None]).logits[0]
        losses.append(torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="sum"))
    expected = torch.stack(losses).sum()
    expected.backward()

    softcap, scale = head_transform(ours.config)
    ours.set_output_embeddings(LossHead.replace(ours.get_output_embeddings(), softcap=softcap, logit_scale=scale))
    inputs = concatenated(docs)
    hidden = ours.get_decoder()(**inputs).last_hidden_state[0]
    last = torch.tensor(inputs["cu_seq_lens_q"][1:].tolist()) - 1
    keep = torch.ones(hidden.shape[0], dtype=torch.bool)
    keep[last] = False
    targets = torch.roll(inputs["input_ids"][0], -1)
    found, _ = ours.get_output_embeddings()(hidden[keep], targets=targets[keep])
    found.backward()

    assert float(found) == pytest.approx(float(expected), rel=1e-5)
    gradients = dict(ours.named_parameters())
    for name, parameter in stock.named_parameters():
        assert torch.allclose(gradients[name].grad, parameter.grad, rtol=1e-4, atol=1e-4), name


def test_documents_do_not_see_each_other(pair):
    """Changing one document leaves the hidden states of the others alone."""
    _, ours = pair
    docs = documents()
    before = ours.get_decoder()(**concatenated(docs)).last_hidden_state[0]
    changed = [docs[0], torch.full_like(docs[1], 17), *docs[2:]]
    after = ours.get_decoder()(**concatenated(changed)).last_hidden_state[0]
    first, second = LENGTHS[0], LENGTHS[0] + LENGTHS[1]
    assert torch.equal(before[:first], after[:first])
    assert torch.equal(before[second:], after[second:])
    assert not torch.equal(before[first:second], after[first:second])


def test_missing_boundaries_and_unknown_features_are_errors():
    module = torch.nn.Module()
    q = torch.randn(1, 2, 4, 8)
    with pytest.raises(ValueError, match="document boundaries"):
        attention.varlen_attention(module, q, q, q, None)
    with pytest.raises(ValueError, match="position_bias"):
        attention.varlen_attention(
            module, q, q, q, None, cu_seq_lens_q=torch.tensor([0, 4]), position_bias=torch.ones(2)
        )


def test_half_precision_is_computed_in_float32_on_cpus():
    """As autocast hands it over: rotary embeddings leave queries and keys in float32, values are bfloat16."""
    generator = torch.Generator().manual_seed(1)
    query, key = (torch.randn(1, 2, 12, 8, generator=generator) for _ in range(2))
    value = torch.randn(1, 2, 12, 8, generator=generator).to(torch.bfloat16)
    bounds = torch.tensor([0, 5, 12], dtype=torch.int32)
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = attention.varlen_attention(torch.nn.Module(), query, key, value, None, cu_seq_lens_q=bounds)
    pieces = [
        torch.nn.functional.scaled_dot_product_attention(q, k, v.float(), is_causal=True)
        for q, k, v in zip(*(t.split([5, 7], dim=2) for t in (query, key, value)), strict=True)
    ]
    assert found.dtype is torch.bfloat16
    assert torch.equal(found, torch.cat(pieces, dim=2).transpose(1, 2).to(torch.bfloat16))

"""Padding-free rows equal separate documents, for every architecture that is trusted with them."""

import copy
import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers.models import tiny_model_dir
from trainer.losses.fuse import head_transform
from trainer.losses.next_token import LossHead
from trainer.model import attention, routing

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
    ours = AutoModelForCausalLM.from_config(config, attn_implementation=attention.VARLEN_ATTENTION).eval()
    ours.load_state_dict(stock.state_dict())
    return stock, ours


def test_attention_of_concatenated_documents_equals_that_of_separate_ones(pair):
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
    ours.set_output_embeddings(LossHead.of_linear(ours.get_output_embeddings(), softcap=softcap, logit_scale=scale))
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


def test_attention_does_not_cross_documents(pair):
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


@pytest.mark.parametrize("values", [24, 16])
def test_attention_kernel_of_a_gpu_gets_heads_of_one_size(monkeypatch, values):
    """Those of latent attention are of two (DeepSeek: queries and keys 192, values 128). The kernel here is a stand-in."""
    generator = torch.Generator().manual_seed(1)
    query, key = (torch.randn(1, heads, 12, 24, generator=generator) for heads in (4, 2))
    value = torch.randn(1, 2, 12, values, generator=generator)
    bounds = torch.tensor([0, 5, 12], dtype=torch.int32)

    def kernel(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa):
        assert q.shape == (12, 4, 24) and k.shape == v.shape == (12, 2, 24), "as torch checks it"
        assert (max_q, max_k, window_size, enable_gqa) == (7, 7, (-1, 0), True) and cu_seq_q is bounds is cu_seq_k
        parts = zip(*(t.transpose(0, 1)[None].split([5, 7], dim=2) for t in (q, k, v)), strict=True)
        options = {"is_causal": True, "enable_gqa": True, "scale": scale}
        made = [torch.nn.functional.scaled_dot_product_attention(*part, **options) for part in parts]
        return torch.cat(made, dim=2)[0].transpose(0, 1)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    boundaries = attention.SequenceBounds(bounds, bounds, 7, 7)
    found = attention._varlen_kernel(query, key, value, boundaries, None, None, True)
    expected, _ = attention.varlen_attention(torch.nn.Module(), query, key, value, None, cu_seq_lens_q=bounds)
    assert found.shape == (1, 12, 4, values) and torch.allclose(found, expected, atol=1e-6)


def test_values_wider_than_queries_are_not_for_that_kernel(monkeypatch):
    monkeypatch.setattr(attention, "device_kind", lambda device: "cuda")
    monkeypatch.setattr(attention, "_flash_support", lambda device: (True, None))
    narrow, wide = torch.empty(1, 2, 4, 64, dtype=torch.bfloat16), torch.empty(1, 2, 4, 128, dtype=torch.bfloat16)
    assert attention._has_varlen_kernel(wide, narrow, None, 0.0)
    assert not attention._has_varlen_kernel(narrow, wide, None, 0.0)


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation makes."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if torch.is_tensor(tensor):
                self.numel = max(self.numel, tensor.numel())
        return made


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("softcap", "sinks"), [(None, False), (5.0, False), (None, True)])
@pytest.mark.parametrize("window", [None, 1, 7, 16, 70])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_attention_of_gpus_equals_one_mask_over_the_document(kv_heads, window, softcap, sinks, causal, monkeypatch):
    """The stretches of a window and the repeated heads, forward and backward, in float64 against the path of CPUs."""
    monkeypatch.setattr(attention, "MIN_QUERIES_PER_CHUNK", 12)
    generator = torch.Generator().manual_seed(2)
    shapes = [(1, 4, 70, 8), (1, kv_heads, 70, 8), (1, kv_heads, 70, 8)]
    inputs = [torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes]
    weights = torch.randn(shapes[0], generator=generator, dtype=torch.float64)
    given = torch.randn(4, generator=generator, dtype=torch.float64) if sinks else None
    rule = attention.AttentionRule(0.3, 0.0, window, softcap, causal, given)
    found = []
    for out in (attention._attend_one_document(*inputs, rule), attention._attend_on_gpu(*inputs, rule)):
        found.append((out, *torch.autograd.grad((out * weights).sum(), inputs)))
    for expected, got in zip(*found, strict=True):
        assert torch.allclose(got, expected, rtol=1e-10, atol=1e-12)


def test_gpus_get_no_square_of_the_document_and_no_grouped_heads(monkeypatch):
    """Grouped heads in float32 go to the kernel that builds every score; a window's mask must not be T x T."""
    asked, real = [], torch.nn.functional.scaled_dot_product_attention

    def note(q, k, v, **options):
        asked.append(options.get("enable_gqa", False) or q.shape[1] != k.shape[1])
        return real(q, k, v, **options)

    monkeypatch.setattr(attention, "MIN_QUERIES_PER_CHUNK", 128)
    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", note)
    length = 2048
    q, (k, v) = torch.randn(1, 4, length, 8), torch.randn(2, 1, 2, length, 8)
    for window in (None, 64):
        with Largest() as largest:
            attention._attend_on_gpu(q, k, v, attention.AttentionRule(None, 0.0, window, None, True, None))
        assert largest.numel <= 128 * (128 + 64) + q.numel()
    assert len(asked) == 1 + length // 128 and not any(asked)


def test_attention_compiled_layers_share_one_graph():
    """A layer's own number, looked at while it is traced, would take one of the eight graphs that torch makes of one piece of
    code; all further layers would run as written."""
    from types import SimpleNamespace

    from torch._dynamo.testing import CompileCounter

    class Layer(torch.nn.Module):
        def __init__(self, number):
            super().__init__()
            self.layer_idx, self.row_in_routing_record = number, number
            self.config = SimpleNamespace(layer_types=["full_attention"] * 3)

        def forward(self, x, bounds):
            out = attention.varlen_attention(self, x, x, x, None, cu_seq_lens_q=bounds, document_bounds=[0, 2, 5])[0]
            routing.count_expert_load(self, out)
            return out

    routing._Recording.note_expert_tokens = torch.compiler.disable(routing._count_tokens)
    traced, graphs = CompileCounter(), []
    for number in range(3):
        layer = Layer(number)
        layer.compile(backend=traced)
        layer(torch.ones(1, 2, 5, 8), torch.tensor([0, 2, 5], dtype=torch.int32))
        graphs.append(traced.frame_count)
    assert graphs[0] > 0 and graphs[2] == graphs[0]
    torch.compiler.reset()

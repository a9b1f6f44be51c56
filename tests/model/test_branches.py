"""Answers that share their prompt in a row: the attention of each is that of the prompt and the answer alone, by every kernel."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from trainer.model import attention, flex
from trainer.model.attention import SequenceBounds, segments_of_branches

PROMPTS = (9, 4)
ANSWERS = ((3, 1, 12), (5, 2))
BOUNDS = [0, 25, 36]
BRANCHES = [[9, 12, 13], [4, 9]]
"""Where answers begin, counted from the begin of their document."""
HEADS, KEY_HEADS, WIDTH = 4, 2, 16


def made_row():
    generator = torch.Generator().manual_seed(3)
    shapes = ((HEADS, BOUNDS[-1], WIDTH), (KEY_HEADS, BOUNDS[-1], WIDTH), (KEY_HEADS, BOUNDS[-1], WIDTH))
    return [torch.randn(1, *shape, generator=generator, requires_grad=True) for shape in shapes]


def one_by_one(q, k, v, *, window=None, softcap=None, sinks=None):
    """Attention written out: each prompt, and each answer behind a copy of its prompt, as a sequence of its own. [1, T, H, D]."""
    k, v = (t.repeat_interleave(HEADS // KEY_HEADS, dim=1) for t in (k, v))
    pieces = []
    for start, prompt, answers in zip(BOUNDS, PROMPTS, ANSWERS, strict=False):
        rows = [list(range(start, start + prompt))]
        kept = [prompt]
        begin = start + prompt
        for length in answers:
            rows.append([*rows[0], *range(begin, begin + length)])
            kept.append(length)
            begin += length
        for sequence, new in zip(rows, kept, strict=True):
            scores = q[:, :, sequence] @ k[:, :, sequence].transpose(-1, -2) / WIDTH**0.5
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            place = torch.arange(len(sequence))
            distance = place[:, None] - place[None, :]
            hidden = (distance < 0) if window is None else (distance < 0) | (distance >= window)
            scores = scores.masked_fill(hidden, -torch.inf)
            if sinks is not None:
                scores = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], dim=-1)
            weights = scores.softmax(-1)[..., : len(sequence)]
            pieces.append((weights @ v[:, :, sequence])[:, :, -new:])
    return torch.cat(pieces, dim=2).transpose(1, 2)


def assert_same(ours, right, row):
    """Outputs and the gradients of q, k and v are equal."""
    direction = torch.randn(right.shape, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(ours, right, rtol=1e-5, atol=1e-6)
    gradients = torch.autograd.grad((ours * direction).sum(), row)
    for found, expected in zip(gradients, torch.autograd.grad((right * direction).sum(), row), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


KINDS = {
    "plain": {},
    "window": {"window": 5},
    "caps": {"softcap": 2.0},
    "sinks": {"sinks": torch.linspace(-1, 1, HEADS)},
}


def ours(row, *, window=None, softcap=None, sinks=None):
    boundaries = torch.tensor(BOUNDS, dtype=torch.int32)
    settings = {"sliding_window": window, "softcap": softcap, "s_aux": sinks}
    given = {"cu_seq_lens_q": boundaries, "document_bounds": BOUNDS, "branches": BRANCHES}
    return attention.varlen_attention(nn.Module(), *row, None, is_causal=True, **settings, **given)[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("longest_under_one_mask", [128, 0])
def test_an_answer_sees_its_prompt_and_itself(monkeypatch, kind, longest_under_one_mask):
    """Under one mask for the document, and branch by branch as long documents and GPUs are computed."""
    monkeypatch.setattr(attention, "MAX_TOKENS_UNDER_ONE_MASK", longest_under_one_mask)
    row = made_row()
    assert_same(ours(row, **KINDS[kind]), one_by_one(*row, **KINDS[kind]), row)


@pytest.mark.parametrize("kind", ["plain", "window"])
def test_the_variable_length_kernel_gets_each_answer_behind_its_prompt(monkeypatch, kind):
    """A stand-in for the kernel of GPUs: sequences of queries and keys, whose last tokens are aligned."""

    def kernel(q, k, v, boundaries: SequenceBounds, scaling, window, causal):
        assert causal
        assert scaling is None
        queries, keys = boundaries.queries.tolist(), boundaries.keys.tolist()
        assert boundaries.longest_query == max(stop - start for start, stop in pairwise(queries))
        assert boundaries.longest_key == max(stop - start for start, stop in pairwise(keys))
        k, v = (t.repeat_interleave(HEADS // KEY_HEADS, dim=1) for t in (k, v))
        pieces = []
        for (q_start, q_stop), (k_start, k_stop) in zip(pairwise(queries), pairwise(keys), strict=True):
            scores = q[:, :, q_start:q_stop] @ k[:, :, k_start:k_stop].transpose(-1, -2) / WIDTH**0.5
            last = k_stop - k_start - (q_stop - q_start)
            distance = last + torch.arange(q_stop - q_start)[:, None] - torch.arange(k_stop - k_start)[None, :]
            hidden = (distance < 0) if window is None else (distance < 0) | (distance >= window)
            pieces.append(scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v[:, :, k_start:k_stop])
        return torch.cat(pieces, dim=2).transpose(1, 2)

    monkeypatch.setattr(attention, "_has_varlen_kernel", lambda *_: True)
    monkeypatch.setattr(attention, "_varlen_kernel", kernel)
    row = made_row()
    assert_same(ours(row, **KINDS[kind]), one_by_one(*row, **KINDS[kind]), row)


@pytest.mark.parametrize("window", [None, 5])
def test_flex_attention_gets_a_mask_that_knows_answers(window):
    def mask_function(batch, head, query, key):
        return (query >= key) if window is None else (query >= key) & (query - key < window)

    inputs = {"cu_seq_lens_q": torch.tensor(BOUNDS, dtype=torch.int32), "branches": BRANCHES}
    with flex.masks_keep_documents_apart(inputs):
        mask = flex.block_mask(1, BOUNDS[-1], BOUNDS[-1], mask_function=mask_function)
    row = made_row()
    assert_same(flex.flex_attention(nn.Module(), *row, mask)[0], one_by_one(*row, window=window), row)


def test_segments_repeat_a_prompt_for_each_answer():
    segments = segments_of_branches([0, 4, 7], [[2, 3], [1]])
    assert segments.query_bounds == [0, 2, 3, 4, 5, 7]
    assert segments.key_bounds == [0, 2, 5, 8, 9, 12]
    assert segments.key_rows.tolist() == [0, 1, 0, 1, 2, 0, 1, 3, 4, 4, 5, 6]


def test_branches_and_chunks_do_not_go_together():
    module = nn.Module()
    module.config = type("Config", (), {"attention_chunk_size": 4})
    with pytest.raises(ValueError, match="branches"):
        attention.varlen_attention(
            module, *made_row(), None, cu_seq_lens_q=torch.tensor(BOUNDS), document_bounds=BOUNDS, branches=BRANCHES
        )

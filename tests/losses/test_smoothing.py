"""Smoothed labels against torch's own cross-entropy: loss, gradients, the loss without, and parts by group."""

import pytest
import torch
import torch.nn.functional as F

from trainer.losses import next_token
from trainer.losses.next_token import LossHead, RowWeighting, logits_loss

EPS, ROWS, WIDTH, WORDS = 0.2, 7, 5, 11


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_loss_and_gradients_are_torchs(monkeypatch, softcap):
    monkeypatch.setattr(next_token, "CHUNK_LOGITS", 3 * WORDS)  # several chunks
    torch.manual_seed(0)
    head = LossHead.of_linear(torch.nn.Linear(WIDTH, WORDS).double(), softcap=softcap, logit_scale=1.5)
    hidden = torch.randn(ROWS, WIDTH, dtype=torch.float64, requires_grad=True)
    targets, weights = torch.randint(WORDS, (ROWS,)), torch.rand(ROWS, dtype=torch.float64)
    weighting = RowWeighting(weights, torch.tensor([0, 1, 1, 0, 1, 0, 0]), 2, EPS)
    total, _, apart, plain = head(hidden, targets=targets, weighting=weighting)
    logits = F.linear(hidden, head.weight, head.bias) * 1.5
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    rows = F.cross_entropy(logits, targets, reduction="none", label_smoothing=EPS) * weights
    assert total.item() == pytest.approx(rows.sum().item(), rel=1e-6)
    assert plain.item() == pytest.approx(
        (F.cross_entropy(logits, targets, reduction="none") * weights).sum().item(), rel=1e-6
    )
    assert apart.sum().item() == pytest.approx(total.item(), rel=1e-6) and apart[0] != apart[1]
    wanted = torch.autograd.grad(rows.sum(), (hidden, head.weight, head.bias))
    for mine, theirs in zip(torch.autograd.grad(total, (hidden, head.weight, head.bias)), wanted, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-6, atol=1e-9)
    found = logits_loss(logits.detach(), targets, weighting)
    assert [round(float(each.detach().sum()), 4) for each in (found[0], found[2], found[3])] == [
        round(float(each.detach().sum()), 4) for each in (total, apart, plain)
    ]

"""The fused head against torch's own cross-entropy."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.losses import divergence, next_token
from trainer.losses.divergence import DivergenceMeasure, TeacherComparison
from trainer.losses.next_token import LossHead, RowWeighting
from trainer.losses.z_loss import sum_of_squared_logsumexp


def reference(hidden, head, targets, softcap, scale):
    logits = head(hidden) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return torch.nn.functional.cross_entropy(logits, targets, reduction="sum"), logits


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("softcap", "scale"), [(None, 1.0), (5.0, 1.0), (None, 0.25), (5.0, 3.0)])
@pytest.mark.parametrize("rows", [0, 1, 50])
def test_fused_head_loss_and_gradients_are_those_of_cross_entropy(monkeypatch, bias, softcap, scale, rows):
    monkeypatch.setattr(next_token, "CHUNK_LOGITS", 31 * 7)  # several chunks, the last one short
    torch.manual_seed(0)
    plain = nn.Linear(16, 31, bias=bias)
    head = LossHead.of_linear(plain, softcap=softcap, logit_scale=scale)
    assert head.weight is plain.weight
    targets = torch.randint(0, 31, (rows,))
    a = torch.randn(rows, 16, requires_grad=True)
    b = a.detach().clone().requires_grad_()
    found, _ = head(a, targets=targets)
    (found * 0.37).backward()
    grads = [p.grad.clone() for p in plain.parameters()]
    plain.zero_grad()
    expected, _ = reference(b, plain, targets, softcap, scale)
    (expected * 0.37).backward()
    assert float(found) == pytest.approx(float(expected), rel=1e-5)
    assert torch.allclose(a.grad, b.grad, atol=1e-6)
    for grad, parameter in zip(grads, plain.parameters(), strict=True):
        assert torch.allclose(grad, parameter.grad, atol=1e-5)


@pytest.mark.parametrize("way", ["sum", "by row", "beside a teacher"])
def test_fused_head_weight_of_another_precision_is_cast_once_a_pass(monkeypatch, way):
    """And not for each chunk of rows: on a GPU that took as long as the products. Gradients have the weight's precision."""
    for module in (next_token, divergence):
        monkeypatch.setattr(module, "CHUNK_LOGITS", 31 * 7)
    casts = []

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten._to_copy.default and args[0].shape == (31, 16):
                casts.append((args[0].dtype, kwargs["dtype"]))
            return function(*args, **(kwargs or {}))

    torch.manual_seed(0)
    head = LossHead.of_linear(nn.Linear(16, 31, bias=False), softcap=None, logit_scale=1.0)
    hidden = torch.randn(50, 16, dtype=torch.bfloat16, requires_grad=True)
    comparison = TeacherComparison(
        DivergenceMeasure(),
        torch.randn(50, 16),
        LossHead.of_linear(nn.Linear(16, 31), softcap=None, logit_scale=1.0),
        1.0,
        1.0,
    )
    more = {"by row": {"by_row": True}, "beside a teacher": {"comparison": comparison}}.get(way, {})
    with Watching():
        found = head(hidden, targets=torch.randint(0, 31, (50,)), **more)
        (found.sum() if way == "by row" else found[0]).backward()
    down = [cast for cast in casts if cast == (torch.float32, torch.bfloat16)]
    assert len(down) == (2 if way == "by row" else 1)  # there the backward pass makes logits again
    assert head.weight.grad.dtype == torch.float32 and head.weight.grad.abs().sum() > 0


def test_fused_head_counts_correct_predictions_without_gradients():
    torch.manual_seed(0)
    plain = nn.Linear(16, 31)
    head = LossHead.of_linear(plain, softcap=None, logit_scale=1.0)
    hidden = torch.randn(50, 16)
    targets = plain(hidden).argmax(-1)
    targets[:20] = (targets[:20] + 1) % 31
    with torch.no_grad():
        value, correct = head(hidden, targets=targets)
    assert float(correct) == 30
    assert float(value) == pytest.approx(float(reference(hidden, plain, targets, None, 1.0)[0].detach()), rel=1e-5)


def test_a_frozen_head_makes_no_weight_gradient():
    head = LossHead.of_linear(nn.Linear(16, 31, bias=False).requires_grad_(False), softcap=None, logit_scale=1.0)
    hidden = torch.randn(5, 16, requires_grad=True)
    value, _ = head(hidden, targets=torch.zeros(5, dtype=torch.long))
    assert value.grad_fn.saved_tensors[1] is None
    value.backward()
    assert head.weight.grad is None and hidden.grad is not None


def test_fused_head_without_targets_is_the_plain_head():
    plain = nn.Linear(16, 31)
    head = LossHead.of_linear(plain, softcap=5.0, logit_scale=2.0)
    hidden = torch.randn(2, 3, 16)
    assert torch.equal(head(hidden), plain(hidden))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("softcap", "scale"), [(None, 1.0), (5.0, 3.0)])
@pytest.mark.parametrize("rows", [0, 1, 9])
def test_fused_head_losses_of_rows_and_their_gradients(monkeypatch, bias, softcap, scale, rows):
    """Against numerical differentiation, in float64, where each row weighs differently."""
    monkeypatch.setattr(next_token, "CHUNK_LOGITS", 11 * 4)  # several chunks, the last one short
    torch.manual_seed(0)
    plain = nn.Linear(6, 11, bias=bias).double()
    head = LossHead.of_linear(plain, softcap=softcap, logit_scale=scale)
    hidden = torch.randn(rows, 6, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 11, (rows,))
    found = head(hidden, targets=targets, by_row=True)
    _, logits = reference(hidden, plain, targets, softcap, scale)
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    assert torch.allclose(found, expected, atol=1e-12)
    mix = torch.randn(rows, dtype=torch.float64)

    def weighed(hidden, *parameters):
        return (torch.tanh(head(hidden, targets=targets, by_row=True)) * mix).sum()

    assert torch.autograd.gradcheck(weighed, (hidden, *plain.parameters()))


def test_rows_of_a_tied_head():
    """The head's weight is also the embedding: both of its gradients add up."""
    torch.manual_seed(0)
    embedding = nn.Embedding(11, 6, dtype=torch.float64)
    head = LossHead.of_linear(nn.Linear(6, 11, bias=False), softcap=None, logit_scale=1.0)
    head.weight = embedding.weight
    tokens, targets = torch.randint(0, 11, (7,)), torch.randint(0, 11, (7,))
    mix = torch.randn(7, dtype=torch.float64)
    (head(embedding(tokens), targets=targets, by_row=True) * mix).sum().backward()
    found = embedding.weight.grad.clone()
    embedding.weight.grad = None
    logits = embedding(tokens) @ embedding.weight.T
    (torch.nn.functional.cross_entropy(logits, targets, reduction="none") * mix).sum().backward()
    assert torch.allclose(found, embedding.weight.grad, atol=1e-12)


def test_fused_head_rows_of_a_frozen_head_keep_only_their_gradient():
    head = LossHead.of_linear(nn.Linear(16, 31, bias=False).requires_grad_(False), softcap=None, logit_scale=1.0)
    hidden = torch.randn(5, 16, requires_grad=True)
    value = head(hidden, targets=torch.zeros(5, dtype=torch.long), by_row=True)
    assert len(value.grad_fn.saved_tensors) == 1
    value.sum().backward()
    assert head.weight.grad is None and hidden.grad is not None
    with torch.no_grad():
        assert torch.equal(head(hidden, targets=torch.zeros(5, dtype=torch.long), by_row=True), value)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("softcap", "scale"), [(None, 1.0), (5.0, 3.0)])
def test_fused_head_with_weighted_rows(monkeypatch, bias, softcap, scale):
    monkeypatch.setattr(next_token, "CHUNK_LOGITS", 31 * 7)  # several chunks, the last one short
    torch.manual_seed(0)
    plain = nn.Linear(16, 31, bias=bias)
    head = LossHead.of_linear(plain, softcap=softcap, logit_scale=scale)
    targets, weights = torch.randint(0, 31, (50,)), torch.rand(50)
    a = torch.randn(50, 16, requires_grad=True)
    b = a.detach().clone().requires_grad_()
    found, _ = head(a, targets=targets, weighting=RowWeighting(weights))
    (found * 0.37).backward()
    grads = [p.grad.clone() for p in plain.parameters()]
    plain.zero_grad()
    _, logits = reference(b, plain, targets, softcap, scale)
    expected = (torch.nn.functional.cross_entropy(logits, targets, reduction="none") * weights).sum()
    (expected * 0.37).backward()
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    for grad, right in zip([a.grad, *grads], [b.grad, *(p.grad for p in plain.parameters())], strict=True):
        assert torch.allclose(grad, right, atol=1e-5) and right.abs().max() > 1e-3
    with torch.no_grad():
        _, correct = head(a, targets=logits.argmax(-1), weighting=RowWeighting(weights))
        assert float(correct) == pytest.approx(float(weights.sum()), rel=1e-6)
        again, _ = next_token.logits_loss(logits, targets, RowWeighting(weights))
        assert float(again) == pytest.approx(float(expected), rel=1e-6)
        assert float(next_token.logits_loss(logits, logits.argmax(-1), RowWeighting(weights))[1]) == pytest.approx(
            float(correct), rel=1e-6
        )
    ones, none = (head(a, targets=targets, weighting=RowWeighting(w))[0].detach() for w in (torch.ones(50), None))
    assert torch.equal(ones, none) and not torch.equal(ones, found.detach())


def test_the_loss_by_group(monkeypatch):
    monkeypatch.setattr(next_token, "CHUNK_LOGITS", 31 * 7)
    torch.manual_seed(0)
    plain = nn.Linear(16, 31)
    head = LossHead.of_linear(plain, softcap=None, logit_scale=1.0)
    hidden, targets = torch.randn(50, 16), torch.randint(0, 31, (50,))
    groups, logits = torch.randint(0, 3, (50,)), plain(hidden).detach()
    each = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    for weights in (None, torch.rand(50)):
        mine = each if weights is None else each * weights
        expected = [float(mine[groups == group].sum()) for group in range(4)]
        for found in (
            head(hidden, targets=targets, weighting=RowWeighting(weights, groups, 4)),
            next_token.logits_loss(logits, targets, RowWeighting(weights, groups, 4)),
        ):
            assert found[2].tolist() == pytest.approx(expected, rel=1e-5) and expected[3] == 0
            assert float(found[0].detach()) == pytest.approx(sum(expected), rel=1e-5)
        without = head(hidden, targets=targets, weighting=RowWeighting(weights))
        assert len(without) == 2
        assert torch.equal(without[0], head(hidden, targets=targets, weighting=RowWeighting(weights, groups, 4))[0])


@pytest.mark.parametrize(("softcap", "scale", "bias"), [(None, 1.0, False), (5.0, 3.0, True)])
def test_the_size_of_logits_is_summed_over_kept_rows(monkeypatch, softcap, scale, bias):
    monkeypatch.setattr(next_token, "CHUNK_LOGITS", 31 * 7)
    torch.manual_seed(0)
    plain = nn.Linear(16, 31, bias=bias)
    kept = torch.arange(50) % 3 > 0
    hidden = torch.randn(50, 16)
    found = {}
    for name, head in {"fused": LossHead.of_linear(plain, softcap=softcap, logit_scale=scale), "plain": plain}.items():
        states = hidden.clone().requires_grad_()
        plain.zero_grad()
        if name == "plain":
            logits = reference(states, plain, torch.zeros(50, dtype=torch.int64), softcap, scale)[1]
            total = (logits.logsumexp(-1).square() * kept).sum()
        else:
            total = sum_of_squared_logsumexp(head, states, kept)
        (total * 0.3).backward()
        found[name] = [total.detach(), states.grad, *(p.grad.clone() for p in plain.parameters())]
    for ours, expected in zip(found["fused"], found["plain"], strict=True):
        assert torch.allclose(ours, expected, rtol=1e-5, atol=1e-4)
    if softcap is None:  # as an adapter on the head leaves it
        assert torch.allclose(sum_of_squared_logsumexp(plain, hidden, kept), found["plain"][0])

"""Divergence of student and teacher over the vocabulary, fused with both heads: logits exist only a chunk at a time.

As in `trainer/losses/next_token.py`, each head is called as a module exactly once a micro-batch, whatever the
micro-batch holds, because sharding gathers the head's weight for that call on all ranks together. The student's head
asks the teacher's to lend its weight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor, nn

from trainer.losses.next_token import CHUNK_LOGITS, Counting, LossHead, _LinearCrossEntropy, _logits, _weighed


class Divergence(StrEnum):
    """What is measured between the distributions P of the teacher and Q of the student.

    KL(P, Q), KL(Q, P), or the generalised Jensen-Shannon divergence of Agarwal et al. 2023 (arXiv:2306.13649):
    `b KL(P, M) + (1 - b) KL(Q, M)` with the mixture `M = b P + (1 - b) Q`.
    """

    forward_kl = "forward_kl"
    reverse_kl = "reverse_kl"
    jensen_shannon = "jensen_shannon"


@dataclass(frozen=True, slots=True)
class Measure:
    """A divergence of distributions softened by a temperature."""

    divergence: Divergence = Divergence.forward_kl
    temperature: float = 1.0
    interpolation: float = 0.5
    """Weight of the teacher in the mixture that Jensen-Shannon compares both with."""

    def __call__(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Divergence of each row `[n]` and its derivative by the student's logits `[n, V]`, of logits `[n, V]`, float32.

        Times the square of the temperature, which keeps gradients of the same size (Hinton et al. 2015, arXiv:1503.02531).
        """
        t = self.temperature
        log_q, log_p = (student / t).log_softmax(-1), (teacher / t).log_softmax(-1)
        q, p = log_q.exp(), log_p.exp()
        if self.divergence is Divergence.forward_kl:
            value, slope = (p * (log_p - log_q)).sum(-1), q - p
        elif self.divergence is Divergence.reverse_kl:
            value = (q * (log_q - log_p)).sum(-1)
            slope = q * (log_q - log_p - value[:, None])
        else:
            beta = self.interpolation
            log_m = torch.log(beta * p + (1 - beta) * q)
            from_student = torch.where(q > 0, log_q - log_m, 0.0)
            from_teacher = torch.where(p > 0, log_p - log_m, 0.0)
            inner = (q * from_student).sum(-1)
            value = beta * (p * from_teacher).sum(-1) + (1 - beta) * inner
            slope = (1 - beta) * q * (from_student - inner[:, None])
        return value * t * t, slope * t


@dataclass(frozen=True, slots=True)
class Against:
    """What supervised rows are compared with, and what becomes of it: part of the student's head's call."""

    measure: Measure
    hidden: Tensor
    """`[M, H]`: the teacher's states at the compared rows."""
    head: nn.Module | None
    """The teacher's LossHead; None where it is the student's own."""
    divergence_weight: float
    loss_weight: float
    """Weight of the plain loss of the compared rows."""
    rows: Tensor | None = None
    """int64 `[M]`: which of the student's rows are compared; None for all of them."""
    others: Tensor | None = None
    """int64: the rows that have their plain loss only."""
    others_weight: float = 1.0
    weights: Tensor | None = None
    """`[N]`: what each of the student's rows counts for, in every part; None where each counts as 1."""

    def __call__(self, head: LossHead, hidden: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        """What the student's head returns when it is called with this, see `compare`."""
        return compare(head, hidden, targets, self)


@dataclass(frozen=True, slots=True)
class _Head:
    """What makes logits of hidden states."""

    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    scale: float

    def logits(self, hidden: Tensor) -> Tensor:
        return _logits(hidden, self.weight, self.bias, self.softcap, self.scale)


class _LinearDivergence(torch.autograd.Function):
    """Weighted sum of plain loss and divergence of rows; gradients are made in the forward pass, chunk by chunk.

    `row_weight [N]`, where given, is what each row counts for.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        row_weight: Tensor | None,
        settings: Any,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        student, teacher, against, training = settings
        need_hidden, need_weight = training and ctx.needs_input_grad[0], training and ctx.needs_input_grad[1]
        need_bias = training and bias is not None and ctx.needs_input_grad[2]
        rows = max(1, CHUNK_LOGITS // (weight.shape[0] + teacher.weight.shape[0]))
        ctx.weight_dtype, weight = weight.dtype, weight.to(hidden.dtype)  # once, not for each chunk
        student = replace(student, weight=weight)
        nll = hidden.new_zeros((), dtype=torch.float32)
        apart = hidden.new_zeros((), dtype=torch.float32)
        correct = hidden.new_zeros((), dtype=torch.float32)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if need_bias and bias is not None else None
        for start in range(0, len(targets), rows):
            chunk, target = hidden[start : start + rows], targets[start : start + rows]
            logits, other = student.logits(chunk), teacher.logits(against.hidden[start : start + rows])
            log_total = logits.logsumexp(dim=-1)
            counted = None if row_weight is None else row_weight[start : start + rows]
            nll += _weighed(log_total - logits.gather(1, target[:, None])[:, 0], counted).sum()
            size = min(logits.shape[1], other.shape[1])  # rows beyond the tokenizer's are padding of either matrix
            value, slope = against.measure(logits[:, :size], other[:, :size])
            apart += _weighed(value, counted).sum()
            if not training:
                correct += _weighed(logits.argmax(dim=-1) == target, counted).sum()
                continue
            grad = torch.zeros_like(logits)
            if against.loss_weight:
                grad = torch.exp(logits - log_total[:, None])
                grad[torch.arange(len(target), device=grad.device), target] -= 1.0
                grad *= against.loss_weight
            grad[:, :size] += against.divergence_weight * slope
            if student.softcap is not None:
                grad = grad * (1.0 - (logits / student.softcap).square())
            grad = grad * student.scale if student.scale != 1.0 else grad
            grad = (grad if counted is None else grad.mul_(counted[:, None])).to(chunk.dtype)
            if grad_hidden is not None:
                torch.mm(grad, weight, out=grad_hidden[start : start + rows])
            if grad_weight is not None:
                grad_weight += grad.T @ chunk
            if grad_bias is not None:
                grad_bias += grad.float().sum(0)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        total = against.loss_weight * nll + against.divergence_weight * apart
        ctx.mark_non_differentiable(nll, apart, correct)
        return total, nll, apart, correct

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor) -> Any:  # type: ignore[override]
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        return (
            None if grad_hidden is None else grad_hidden * grad_total.to(grad_hidden.dtype),
            None if grad_weight is None else (grad_weight * grad_total).to(ctx.weight_dtype),
            None if grad_bias is None else (grad_bias * grad_total).to(ctx.weight_dtype),
            None,
            None,
            None,
        )


def compare(head: LossHead, hidden: Tensor, targets: Tensor, against: Against) -> tuple[Tensor, ...]:
    """Sums over rows, 0-d float32: the weighted sum with the gradient, then without one the plain loss, divergence and
    correct argmaxes (in evaluation) of the compared rows, and the plain loss of the others.

    Called inside the student's head's own forward.
    """
    training = torch.is_grad_enabled()
    own = _Head(head.training_weight, head.bias, head.softcap, head.logit_scale)

    def weights(rows: Tensor | None) -> Tensor | None:
        return against.weights if rows is None or against.weights is None else against.weights[rows]

    def measured(lent: _Head) -> tuple[Tensor, ...]:
        compared, wanted = hidden, targets
        if against.rows is not None:
            compared, wanted = hidden[against.rows], targets[against.rows]
        settings = own, lent, against, training
        return _LinearDivergence.apply(
            compared, head.training_weight, head.bias, wanted, weights(against.rows), settings
        )

    total, nll, apart, correct = measured(own) if against.head is None else lend(against.head, measured)
    if against.others is None:
        return total, nll, apart, correct, torch.zeros_like(nll)
    plain, *_ = _LinearCrossEntropy.apply(
        hidden[against.others],
        head.training_weight,
        head.bias,
        targets[against.others],
        Counting(weights(against.others)),
        (head.softcap, head.logit_scale, training),
    )
    return total + against.others_weight * plain, nll, apart, correct, plain.detach()


def lend(head: nn.Module, use: Callable[[_Head], Any]) -> Any:
    """`use` what makes the logits of another LossHead, inside the call of that head: only there its weight is whole."""
    return head(None, lend=lambda: use(_Head(head.training_weight, head.bias, head.softcap, head.logit_scale)))  # type: ignore

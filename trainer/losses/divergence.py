"""Divergence of student and teacher over the vocabulary, fused with both heads: logits exist only a chunk at a time.

As in `trainer/losses/next_token.py`, each head is called as a module exactly once a micro-batch, whatever the micro-batch holds,
because sharding gathers the head's weight for that call on all ranks together. Inside the call of the student's head the
teacher's head is called too, and lends its weight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor, nn

from trainer.losses.next_token import CHUNK_LOGITS, LossHead, RowCounting, _LinearCrossEntropy, _logits, _weighted


class Divergence(StrEnum):
    """How the distributions P of the teacher and Q of the student are compared.

    KL(P, Q), KL(Q, P), or the generalised Jensen-Shannon divergence of Agarwal et al. 2023 (arXiv:2306.13649):
    `b KL(P, M) + (1 - b) KL(Q, M)` with the mixture `M = b P + (1 - b) Q`.
    """

    forward_kl = "forward_kl"
    reverse_kl = "reverse_kl"
    jensen_shannon = "jensen_shannon"


@dataclass(frozen=True, slots=True)
class Measure:
    """A divergence between distributions that are softened by a temperature."""

    divergence: Divergence = Divergence.forward_kl
    temperature: float = 1.0
    interpolation: float = 0.5
    """Weight of the teacher in the mixture that Jensen-Shannon compares both with."""

    def __call__(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """(divergence of each row `[n]`, its derivative by the student's logits `[n, V]`), for float32 logits `[n, V]`.

        Both are multiplied by the square of the temperature, which keeps gradients at the same size for every temperature
        (Hinton et al. 2015, arXiv:1503.02531).
        """
        temperature = self.temperature
        log_q = (student / temperature).log_softmax(-1)
        log_p = (teacher / temperature).log_softmax(-1)
        q = log_q.exp()
        p = log_p.exp()
        if self.divergence is Divergence.forward_kl:
            divergence = (p * (log_p - log_q)).sum(-1)
            gradient = q - p
        elif self.divergence is Divergence.reverse_kl:
            divergence = (q * (log_q - log_p)).sum(-1)
            gradient = q * (log_q - log_p - divergence[:, None])
        else:
            beta = self.interpolation
            log_m = torch.log(beta * p + (1 - beta) * q)
            # Where a probability has underflown to 0, its term is 0, not NaN.
            from_student = torch.where(q > 0, log_q - log_m, 0.0)
            from_teacher = torch.where(p > 0, log_p - log_m, 0.0)
            inner = (q * from_student).sum(-1)
            divergence = beta * (p * from_teacher).sum(-1) + (1 - beta) * inner
            gradient = (1 - beta) * q * (from_student - inner[:, None])
        return divergence * temperature * temperature, gradient * temperature


@dataclass(frozen=True, slots=True)
class TeacherComparison:
    """Compares supervised rows with a teacher: passed to the call of the student's head (`LossHead(against=...)`)."""

    measure: Measure
    hidden: Tensor
    """`[M, H]`: the teacher's states at the compared rows."""
    head: nn.Module | None
    """The teacher's LossHead; None if the student's own head makes the teacher's logits too."""
    divergence_weight: float
    loss_weight: float
    """Weight of the plain loss of the compared rows."""
    rows: Tensor | None = None
    """int64 `[M]`: the student's rows that are compared; None: all of them."""
    others: Tensor | None = None
    """int64: the rows that only have their plain loss."""
    others_weight: float = 1.0
    """Weight of the plain loss of `others`."""
    weights: Tensor | None = None
    """`[N]`: weight of each of the student's rows, in every part of the loss; None: each counts as 1."""

    def __call__(self, head: LossHead, hidden: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        """What the student's head returns if it is called with this object; see `compare`."""
        return compare(head, hidden, targets, self)


@dataclass(frozen=True, slots=True)
class _HeadParameters:
    """Everything that turns hidden states into logits."""

    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    scale: float

    def logits(self, hidden: Tensor) -> Tensor:
        return _logits(hidden, self.weight, self.bias, self.softcap, self.scale)


class _LinearDivergence(torch.autograd.Function):
    """Weighted sum of plain loss and divergence over rows. Gradients are made in the forward pass, chunk by chunk.

    `row_weight [N]`: the weight of each row; None: each counts as 1. Returns that sum, and for the log the plain loss, the
    divergence, and the number of correct argmaxes (counted only without gradients).
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
        """(weighted sum, plain loss, divergence, correct argmaxes) of `hidden [N, H]`; the gradients are saved for `backward`."""
        student, teacher, against, training = settings
        need_hidden = training and ctx.needs_input_grad[0]
        need_weight = training and ctx.needs_input_grad[1]
        need_bias = training and ctx.needs_input_grad[2]
        # Logits of both heads exist at the same time.
        chunk_rows = max(1, CHUNK_LOGITS // (weight.shape[0] + teacher.weight.shape[0]))
        ctx.weight_dtype = weight.dtype
        weight = weight.to(hidden.dtype)  # once, not for each chunk
        student = replace(student, weight=weight)

        # Sums over all chunks.
        nll = hidden.new_zeros((), dtype=torch.float32)
        divergence = hidden.new_zeros((), dtype=torch.float32)
        correct = hidden.new_zeros((), dtype=torch.float32)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if need_bias and bias is not None else None
        for start in range(0, len(targets), chunk_rows):
            chunk = hidden[start : start + chunk_rows]
            target = targets[start : start + chunk_rows]
            # The chunk's losses.
            logits = student.logits(chunk)
            teacher_logits = teacher.logits(against.hidden[start : start + chunk_rows])
            log_total = logits.logsumexp(dim=-1)
            chunk_weight = None if row_weight is None else row_weight[start : start + chunk_rows]
            nll += _weighted(log_total - logits.gather(1, target[:, None])[:, 0], chunk_weight).sum()
            # Either head may be padded beyond the tokenizer's vocabulary: the padding is not compared.
            shared_vocabulary = min(logits.shape[1], teacher_logits.shape[1])
            row_divergence, divergence_gradient = against.measure(
                logits[:, :shared_vocabulary], teacher_logits[:, :shared_vocabulary]
            )
            divergence += _weighted(row_divergence, chunk_weight).sum()
            if not training:
                correct += _weighted(logits.argmax(dim=-1) == target, chunk_weight).sum()
                continue

            # Its gradient by the logits first; then the chain rule for soft cap, factor and the weights of rows.
            grad = torch.zeros_like(logits)
            if against.loss_weight:
                grad = torch.exp(logits - log_total[:, None])
                grad[torch.arange(len(target), device=grad.device), target] -= 1.0
                grad *= against.loss_weight
            grad[:, :shared_vocabulary] += against.divergence_weight * divergence_gradient
            if student.softcap is not None:
                grad = grad * (1.0 - (logits / student.softcap).square())
            if student.scale != 1.0:
                grad = grad * student.scale
            if chunk_weight is not None:
                grad.mul_(chunk_weight[:, None])
            grad = grad.to(chunk.dtype)
            if grad_hidden is not None:
                torch.mm(grad, weight, out=grad_hidden[start : start + chunk_rows])
            if grad_weight is not None:
                grad_weight += grad.T @ chunk
            if grad_bias is not None:
                grad_bias += grad.float().sum(0)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        total = against.loss_weight * nll + against.divergence_weight * divergence
        ctx.mark_non_differentiable(nll, divergence, correct)
        return total, nll, divergence, correct

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor) -> Any:  # type: ignore[override]
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad_total.to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * grad_total).to(ctx.weight_dtype)
        if grad_bias is not None:
            grad_bias = (grad_bias * grad_total).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None


def compare(head: LossHead, hidden: Tensor, targets: Tensor, against: TeacherComparison) -> tuple[Tensor, ...]:
    """Compare student and teacher on rows: (total, nll, divergence, correct, other_loss), five sums over rows, 0-d float32.

    - total: the weighted sum of all losses, the only one with a gradient. The others are for the log.
    - nll, divergence, correct: plain loss, divergence and (in evaluation) correct argmaxes of the compared rows, `against.rows`.
    - other_loss: plain loss of `against.others`, rows that are not compared; 0 without such rows.

    Called inside the forward pass of the student's head. Without `against.head` teacher and student share the head.
    """
    training = torch.is_grad_enabled()
    student_head = _HeadParameters(head.training_weight, head.bias, head.softcap, head.logit_scale)

    def weights_of(rows: Tensor | None) -> Tensor | None:
        if rows is None or against.weights is None:
            return against.weights
        return against.weights[rows]

    def losses_against(teacher_head: _HeadParameters) -> tuple[Tensor, ...]:
        """The four results of `_LinearDivergence` for the compared rows."""
        compared_hidden = hidden
        compared_targets = targets
        if against.rows is not None:
            compared_hidden = hidden[against.rows]
            compared_targets = targets[against.rows]
        settings = student_head, teacher_head, against, training
        return _LinearDivergence.apply(
            compared_hidden, head.training_weight, head.bias, compared_targets, weights_of(against.rows), settings
        )

    if against.head is None:
        total, nll, divergence, correct = losses_against(student_head)
    else:
        total, nll, divergence, correct = lend(against.head, losses_against)
    if against.others is None:
        return total, nll, divergence, correct, torch.zeros_like(nll)
    other_loss, *_ = _LinearCrossEntropy.apply(
        hidden[against.others],
        head.training_weight,
        head.bias,
        targets[against.others],
        RowCounting(weights_of(against.others)),
        (head.softcap, head.logit_scale, training),
    )
    return total + against.others_weight * other_loss, nll, divergence, correct, other_loss.detach()


def lend(head: nn.Module, function: Callable[[_HeadParameters], Any]) -> Any:
    """What `function` returns for the parameters of another LossHead.

    It is called inside that head's own forward pass: only there the weight of a sharded head is whole.
    """
    # The head may stand inside a wrapper of peft, which passes attributes on: its type is no more than a module's.
    loss_head: Any = head

    def call_with_parameters() -> Any:
        return function(
            _HeadParameters(loss_head.training_weight, loss_head.bias, loss_head.softcap, loss_head.logit_scale)
        )

    return head(None, lend=call_with_parameters)

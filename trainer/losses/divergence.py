"""Divergence of student and teacher over the vocabulary, fused with both heads: logits exist only a chunk at a time.

As in `trainer/losses/next_token.py`, each head is called as a module exactly once a micro-batch, whatever the micro-batch holds,
because sharding gathers the head's weight for that call on all ranks together. Inside the call of the student's head the
teacher's head is called too, and lends its weight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trainer.losses.next_token import (
    CHUNK_LOGITS,
    HeadSettings,
    LossHead,
    RowWeighting,
    _LinearCrossEntropy,
    _logits,
    _weighted,
)


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
    """Compares supervised rows with a teacher: passed to the call of the student's head (`LossHead(comparison=...)`).

    That call then returns `DistillationLosses`, as a plain tuple.
    """

    measure: Measure
    hidden: Tensor
    """`[M, H]`: the teacher's states at the compared rows."""
    head: nn.Module | None
    """The teacher's LossHead; None if the student's own head makes the teacher's logits too."""
    divergence_weight: float
    loss_weight: float
    """Weight of the cross-entropy of the compared rows."""
    compared_rows: Tensor | None = None
    """int64 `[M]`: the student's rows that are compared; None: all of them."""
    plain_rows: Tensor | None = None
    """int64: the rows that are not compared, and only have their cross-entropy."""
    plain_weight: float = 1.0
    """Weight of the cross-entropy of `plain_rows`."""
    row_weights: Tensor | None = None
    """`[N]`: weight of each of the student's rows, in every part of the loss; None: each counts as 1."""

    def __call__(self, head: LossHead, hidden: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        """The `DistillationLosses` of the student's rows `hidden [N, H]`, as a plain tuple. `head`: the student's."""
        # A plain one, since wrappers of modules may copy the tuples that they return.
        return tuple(distillation_losses(head, hidden, targets, self))

    def weights_of(self, rows: Tensor | None) -> Tensor | None:
        """The weights of some of the student's rows (None: of all); None if each counts as 1."""
        if rows is None or self.row_weights is None:
            return self.row_weights
        return self.row_weights[rows]


class DistillationLosses(NamedTuple):
    """Sums over rows, 0-d float32. Only `total` has a gradient; the others are for the log."""

    total: Tensor
    """The weighted sum of all losses."""
    compared_nll: Tensor
    """Cross-entropy of the compared rows."""
    divergence: Tensor
    """Divergence of the student from the teacher at the compared rows."""
    correct: Tensor
    """Correct argmaxes of the compared rows, counted only in evaluation."""
    plain_nll: Tensor
    """Cross-entropy of the rows that are not compared; 0 without such rows."""


@dataclass(frozen=True, slots=True)
class _HeadParameters:
    """Everything that turns hidden states into logits."""

    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    scale: float

    @classmethod
    def of(cls, head: Any) -> _HeadParameters:
        """Those of a LossHead, perhaps inside a wrapper of peft, which passes attributes on."""
        return cls(weight=head.training_weight, bias=head.bias, softcap=head.softcap, scale=head.logit_scale)

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
        student, teacher, comparison, training = settings
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
            teacher_logits = teacher.logits(comparison.hidden[start : start + chunk_rows])
            log_total = logits.logsumexp(dim=-1)
            chunk_weight = None if row_weight is None else row_weight[start : start + chunk_rows]
            nll += _weighted(log_total - logits.gather(1, target[:, None])[:, 0], chunk_weight).sum()
            # Either head may be padded beyond the tokenizer's vocabulary: the padding is not compared.
            shared_vocabulary = min(logits.shape[1], teacher_logits.shape[1])
            row_divergence, divergence_gradient = comparison.measure(
                logits[:, :shared_vocabulary], teacher_logits[:, :shared_vocabulary]
            )
            divergence += _weighted(row_divergence, chunk_weight).sum()
            if not training:
                correct += _weighted(logits.argmax(dim=-1) == target, chunk_weight).sum()
                continue

            # Its gradient by the logits first; then the chain rule for soft cap, factor and the weights of rows.
            grad = torch.zeros_like(logits)
            if comparison.loss_weight:
                grad = torch.exp(logits - log_total[:, None])
                grad[torch.arange(len(target), device=grad.device), target] -= 1.0
                grad *= comparison.loss_weight
            grad[:, :shared_vocabulary] += comparison.divergence_weight * divergence_gradient
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
        total = comparison.loss_weight * nll + comparison.divergence_weight * divergence
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


def distillation_losses(
    head: LossHead, hidden: Tensor, targets: Tensor, comparison: TeacherComparison
) -> DistillationLosses:
    """The losses of a student's rows `hidden [N, H]`, of which `comparison.compared_rows` are compared with the teacher.

    Called inside the forward pass of the student's head `head`. Without `comparison.head`, teacher and student share the head.
    """
    training = torch.is_grad_enabled()
    student_head = _HeadParameters.of(head)

    def compared_losses(teacher_head: _HeadParameters) -> tuple[Tensor, ...]:
        """(total, cross-entropy, divergence, correct argmaxes) of the compared rows."""
        rows = comparison.compared_rows
        settings = student_head, teacher_head, comparison, training
        return _LinearDivergence.apply(
            hidden if rows is None else hidden[rows],
            head.training_weight,
            head.bias,
            targets if rows is None else targets[rows],
            comparison.weights_of(rows),
            settings,
        )

    if comparison.head is None:
        total, compared_nll, divergence, correct = compared_losses(student_head)
    else:
        total, compared_nll, divergence, correct = _call_with_gathered_head(comparison.head, compared_losses)
    plain_rows = comparison.plain_rows
    if plain_rows is None:
        return DistillationLosses(total, compared_nll, divergence, correct, plain_nll=torch.zeros_like(compared_nll))
    plain_nll, *_ = _LinearCrossEntropy.apply(
        hidden[plain_rows],
        head.training_weight,
        head.bias,
        targets[plain_rows],
        RowWeighting(comparison.weights_of(plain_rows)),
        HeadSettings(head.softcap, head.logit_scale, needs_gradients=training),
    )
    total = total + comparison.plain_weight * plain_nll
    return DistillationLosses(total, compared_nll, divergence, correct, plain_nll=plain_nll.detach())


def _call_with_gathered_head(head: nn.Module, function: Callable[[_HeadParameters], Any]) -> Any:
    """What `function` returns for the parameters of another LossHead, such as the teacher's.

    It is called inside that head's own forward pass: only there the weight of a sharded head is whole.
    """
    return head(None, call_while_gathered=lambda: function(_HeadParameters.of(head)))

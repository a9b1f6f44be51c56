"""Divergence of student and teacher over the vocabulary, fused with both heads: logits exist only a chunk at a time.

As in `trainer/losses/next_token.py`, each head is called as a module exactly once a micro-batch, whatever the micro-batch holds,
because sharding gathers the head's weight for that call on all ranks together. Inside the call of the student's head the
teacher's head is called too, so that both weights are gathered. Letters for shapes and the logits `l = c tanh(s z / c)` are those
of that file: N and M rows, n rows of a chunk, H size of a hidden state, V of the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trainer.losses.next_token import (
    CHUNK_LOGITS,
    HeadSettings,
    LossHead,
    RowWeighting,
    _LinearCrossEntropy,
    head_logits,
    weight_rows,
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
class DivergenceMeasure:
    """A divergence between distributions that are softened by a temperature."""

    divergence: Divergence = Divergence.forward_kl
    temperature: float = 1.0
    interpolation: float = 0.5
    """Weight of the teacher in the mixture that Jensen-Shannon compares both with."""

    def __call__(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Compare student and teacher at n rows: (divergence `[n]`, its derivative by the student's logits `[n, V]`).

        `student`, `teacher`: float32 logits `[n, V]`. Both results are multiplied by the square of the temperature, which keeps
        gradients at the same size for every temperature (Hinton et al. 2015, arXiv:1503.02531).
        """
        temperature = self.temperature
        # P and Q are the softmax of logits / T. All tensors are [n, V], sums over the vocabulary [n].
        log_q = (student / temperature).log_softmax(-1)
        log_p = (teacher / temperature).log_softmax(-1)
        q = log_q.exp()
        p = log_p.exp()
        # `gradient` is the derivative by the student's logits / T: dQ_i / d(l_j / T) = Q_i (1[i = j] - Q_j).
        if self.divergence is Divergence.forward_kl:
            divergence = (p * (log_p - log_q)).sum(-1)  # KL(P, Q)
            gradient = q - p
        elif self.divergence is Divergence.reverse_kl:
            divergence = (q * (log_q - log_p)).sum(-1)  # KL(Q, P)
            gradient = q * (log_q - log_p - divergence[:, None])
        else:
            # The generalised Jensen-Shannon divergence, with the mixture M = b P + (1 - b) Q.
            beta = self.interpolation
            log_m = torch.log(beta * p + (1 - beta) * q)
            # If a probability has underflown to 0, its term is 0, not NaN.
            log_q_over_m = torch.where(q > 0, log_q - log_m, 0.0)
            log_p_over_m = torch.where(p > 0, log_p - log_m, 0.0)
            kl_q_m = (q * log_q_over_m).sum(-1)
            divergence = beta * (p * log_p_over_m).sum(-1) + (1 - beta) * kl_q_m  # b KL(P, M) + (1 - b) KL(Q, M)
            gradient = (1 - beta) * q * (log_q_over_m - kl_q_m[:, None])
        # By the logits themselves the derivative has another factor 1 / T, so that of T^2 one T is left.
        return divergence * temperature * temperature, gradient * temperature


@dataclass(frozen=True, slots=True)
class TeacherComparison:
    """Compares supervised rows with a teacher: passed to the call of the student's head (`LossHead(comparison=...)`).

    That call then returns `DistillationLosses`, as a plain tuple.
    """

    measure: DivergenceMeasure
    hidden: Tensor
    """`[M, H]`: the teacher's states at the compared rows."""
    head: nn.Module | None
    """The teacher's LossHead; None if the student's own head makes the teacher's logits too."""
    divergence_weight: float
    loss_weight: float
    """Weight of the cross-entropy of the compared rows."""
    compared_rows: Tensor | None = None
    """int64 `[M]`: the student's rows that are compared; None: all of them."""
    uncompared_rows: Tensor | None = None
    """int64: the rows that are not compared, and only have their cross-entropy."""
    uncompared_weight: float = 1.0
    """Weight of the cross-entropy of `uncompared_rows`."""
    row_weights: Tensor | None = None
    """`[N]`: weight of each of the student's rows, in every part of the loss; None: each counts as 1."""

    def __call__(self, head: LossHead, hidden: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        """The `DistillationLosses` of the student's rows `hidden [N, H]`, as a plain tuple. `head`: the student's."""
        # A plain one, since wrappers of modules may copy the tuples that they return.
        return tuple(distillation_losses(head, hidden, targets, self))

    def weights_of(self, rows: Tensor | None) -> Tensor | None:
        """The weights of some of the student's rows, by their indices (None: of all rows); None if each counts as 1."""
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
    uncompared_nll: Tensor
    """Cross-entropy of the rows that are not compared; 0 without such rows."""


@dataclass(frozen=True, slots=True)
class _HeadParameters:
    """The parameters and settings of a LossHead that turn hidden states `[n, H]` into logits `[n, V]`."""

    weight: Tensor
    """`[V, H]`"""
    bias: Tensor | None
    softcap: float | None
    scale: float

    @classmethod
    def of_head(cls, head: Any) -> _HeadParameters:
        """The parameters of `head`: a LossHead, or a wrapper of peft around one, which passes attributes on."""
        return cls(weight=head.training_weight, bias=head.bias, softcap=head.softcap, scale=head.logit_scale)

    def logits(self, hidden: Tensor) -> Tensor:
        """The logits `[n, V]` of hidden states `[n, H]`, in float32 or wider."""
        return head_logits(hidden, self.weight, self.bias, self.softcap, self.scale)


class _DistillationSettings(NamedTuple):
    """What `_LinearDivergence` needs beside tensors with gradients."""

    student: _HeadParameters
    teacher: _HeadParameters
    comparison: TeacherComparison
    needs_gradients: bool


class _LinearDivergence(torch.autograd.Function):
    """The loss of distillation, a weighted sum of cross-entropy and divergence over rows.

    The forward pass also computes the gradients, chunk by chunk, while a chunk's logits exist.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        row_weights: Tensor | None,
        settings: _DistillationSettings,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Sums over the rows of the student's `hidden [N, H]`: (weighted sum, cross-entropy, divergence, correct argmaxes).

        `weight [V, H]` and `bias [V]`: of the student's head. `row_weights [N]`: None: each row counts as 1. Only the weighted
        sum has a gradient; correct argmaxes are counted only without gradients. Saves for `backward`, of those that are needed:
        the gradients of the weighted sum by hidden, weight and bias.
        """
        student = settings.student
        teacher = settings.teacher
        comparison = settings.comparison
        training = settings.needs_gradients
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
            chunk_targets = targets[start : start + chunk_rows]
            # The chunk's losses. Cross-entropy of a row: log sum exp(l) - l(target).
            logits = student.logits(chunk)  # [n, V]
            teacher_logits = teacher.logits(comparison.hidden[start : start + chunk_rows])  # [n, V of the teacher]
            logsumexp = logits.logsumexp(dim=-1)  # [n]
            chunk_weights = None if row_weights is None else row_weights[start : start + chunk_rows]
            nll += weight_rows(logsumexp - logits.gather(1, chunk_targets[:, None])[:, 0], chunk_weights).sum()
            # Either head may be padded beyond the tokenizer's vocabulary: the padding is not compared.
            shared_vocabulary = min(logits.shape[1], teacher_logits.shape[1])
            row_divergence, divergence_gradient = comparison.measure(
                logits[:, :shared_vocabulary], teacher_logits[:, :shared_vocabulary]
            )
            divergence += weight_rows(row_divergence, chunk_weights).sum()
            if not training:
                correct += weight_rows(logits.argmax(dim=-1) == chunk_targets, chunk_weights).sum()
                continue

            # dL/dl [n, V]: softmax(l), minus 1 at the target, for the cross-entropy; plus the gradient of the divergence.
            grad = torch.zeros_like(logits)
            if comparison.loss_weight:
                grad = torch.exp(logits - logsumexp[:, None])
                grad[torch.arange(len(chunk_targets), device=grad.device), chunk_targets] -= 1.0
                grad *= comparison.loss_weight
            grad[:, :shared_vocabulary] += comparison.divergence_weight * divergence_gradient
            # By the product z, since l = c tanh(s z / c): dl/dz = s (1 - (l / c)^2). Then the weight of each row: G = dL/dz.
            if student.softcap is not None:
                grad = grad * (1.0 - (logits / student.softcap).square())
            if student.scale != 1.0:
                grad = grad * student.scale
            if chunk_weights is not None:
                grad.mul_(chunk_weights[:, None])
            # Of the chunk's parameters and states: dL/dx = G W, dL/dW = G^T x, dL/db = sum of G over rows.
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
        """The gradients of hidden `[N, H]`, weight `[V, H]` and bias `[V]`: those of the forward pass, times `grad_total`.

        `grad_total`: 0-d, derivative of the step's loss by the weighted sum that `forward` returned.
        """
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad_total.to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * grad_total).to(ctx.weight_dtype)
        if grad_bias is not None:
            grad_bias = (grad_bias * grad_total).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None  # none by targets, row weights and settings


def distillation_losses(
    head: LossHead, hidden: Tensor, targets: Tensor, comparison: TeacherComparison
) -> DistillationLosses:
    """The losses of a student's rows `hidden [N, H]`: cross-entropy with `targets [N]`, and divergence from a teacher.

    Called inside the forward pass of the student's head `head`. `comparison`: the teacher's states and head, which rows are
    compared, and the weights of the losses. Without `comparison.head`, teacher and student share the head.
    """
    training = torch.is_grad_enabled()  # read here: inside an autograd function gradients are always off
    student = _HeadParameters.of_head(head)
    compare = partial(_compared_sums, head, hidden, targets, comparison, student, needs_gradients=training)
    teacher_head = comparison.head
    if teacher_head is None:
        total, compared_nll, divergence, correct = compare(student)
    else:
        # Inside the teacher's own forward pass: only there is the weight of a sharded head gathered.
        total, compared_nll, divergence, correct = teacher_head(
            None, call_while_gathered=lambda: compare(_HeadParameters.of_head(teacher_head))
        )
    # The remaining rows, which the teacher has no states for, count by their cross-entropy alone.
    rows = comparison.uncompared_rows
    if rows is None:
        no_loss = torch.zeros_like(compared_nll)
        return DistillationLosses(total, compared_nll, divergence, correct, uncompared_nll=no_loss)
    uncompared_nll, *_ = _LinearCrossEntropy.apply(
        hidden[rows],
        head.training_weight,
        head.bias,
        targets[rows],
        RowWeighting(comparison.weights_of(rows)),
        HeadSettings(head.softcap, head.logit_scale, needs_gradients=training),
    )
    total = total + comparison.uncompared_weight * uncompared_nll
    return DistillationLosses(total, compared_nll, divergence, correct, uncompared_nll=uncompared_nll.detach())


def _compared_sums(
    head: LossHead,
    hidden: Tensor,
    targets: Tensor,
    comparison: TeacherComparison,
    student: _HeadParameters,
    teacher: _HeadParameters,
    *,
    needs_gradients: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums over the rows of `hidden [N, H]` that are compared: (total, cross-entropy, divergence, correct argmaxes).

    `head`: the student's, whose parameters and settings are `student`. `teacher`: those of the teacher's head, which must be
    gathered.
    """
    rows = comparison.compared_rows
    return _LinearDivergence.apply(  # type: ignore[no-any-return]
        hidden if rows is None else hidden[rows],
        head.training_weight,
        head.bias,
        targets if rows is None else targets[rows],
        comparison.weights_of(rows),
        _DistillationSettings(student, teacher, comparison, needs_gradients),
    )

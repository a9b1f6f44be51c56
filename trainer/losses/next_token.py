"""The output head and the next-token loss, fused: logits exist only at supervised rows and only a chunk at a time.

Sharding forbids touching the head's weight from outside its own forward (FSDP2 would mix plain and distributed tensors,
ZeRO-3 sees an empty one), so the loss is computed by *calling the head as a module*.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.losses.frozen_row import without_row


@dataclass(frozen=True, slots=True)
class RowCounting:
    """How rows are counted: by `weights [N]` (None: each as 1), and apart by `groups` (int64 `[N]`, `num` of them)."""

    weights: Tensor | None = None
    groups: Tensor | None = None
    num: int = 0
    smoothing: float = 0.0
    """Share of each target that is spread evenly over the vocabulary (Szegedy et al. 2016, arXiv:1512.00567, section 7)."""


HeadSettings = tuple[float | None, float, bool]
"""Soft cap and factor of the logits, and whether gradients are made."""
CHUNK_LOGITS = 2**25
"""Most logits held at once (rows times vocabulary); 128 MiB in float32."""


def _logits(chunk: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, scale: float) -> Tensor:
    """Logits of a chunk of rows, in float32 at least."""
    logits = F.linear(chunk, weight.to(chunk.dtype), None if bias is None else bias.to(chunk.dtype))
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if scale != 1.0:
        logits = logits * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _product_gradient(
    logits: Tensor,
    log_probabilities: Tensor,
    targets: Tensor,
    softcap: float | None,
    scale: float,
    smoothing: float = 0.0,
) -> Tensor:
    """Each row's derivative of its own (smoothed) negative log-likelihood by the head's plain product, `[n, V]`.

    Overwrites `log_probabilities`: the logits of a large vocabulary are the largest tensors of a step.
    """
    grad = log_probabilities.exp_()
    grad[torch.arange(len(targets), device=grad.device), targets] -= 1.0 - smoothing
    if smoothing:
        grad.sub_(smoothing / grad.shape[-1])
    if softcap is not None:
        grad.mul_(1.0 - (logits / softcap).square())
    return grad.mul_(scale) if scale != 1.0 else grad


def _sum_of_products(total: Tensor | None, grad: Tensor, chunk: Tensor) -> Tensor:
    """`total + grad.T @ chunk` in float32 at least, in place; the first product is the sum itself."""
    if total is None:
        return (grad.T @ chunk).to(torch.promote_types(chunk.dtype, torch.float32))
    if total.dtype == chunk.dtype:
        return total.addmm_(grad.T, chunk)
    return total.add_(grad.T @ chunk)


def _weighted(rows: Tensor, weight: Tensor | None) -> Tensor:
    """Rows times their weights."""
    return rows if weight is None else rows * weight


class _LinearCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy of `hidden @ weight.T`; gradients are made in the forward pass, chunk by chunk.

    The third result is the loss of each group of rows, `[num]`; the fourth the sum without smoothing, where labels are smoothed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        counting: RowCounting,
        settings: HeadSettings,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        softcap, scale, training = settings
        row_weight, groups, smoothing = counting.weights, counting.groups, counting.smoothing
        need_hidden, need_weight = training and ctx.needs_input_grad[0], training and ctx.needs_input_grad[1]
        need_bias = training and bias is not None and ctx.needs_input_grad[2]
        chunk_rows = max(1, CHUNK_LOGITS // weight.shape[0])
        ctx.weight_dtype, weight = (
            weight.dtype,
            weight.to(hidden.dtype),
        )  # once: for each chunk it would take as long as products
        loss = hidden.new_zeros((), dtype=torch.float32)
        correct = hidden.new_zeros((), dtype=torch.float32)
        loss_by_group = hidden.new_zeros(counting.num, dtype=torch.float32)
        unsmoothed = hidden.new_zeros((), dtype=torch.float32) if smoothing else None
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight: Tensor | None = None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if need_bias and bias is not None else None
        for start in range(0, hidden.shape[0], chunk_rows):
            chunk, target = hidden[start : start + chunk_rows], targets[start : start + chunk_rows]
            logits = _logits(chunk, weight, bias, softcap, scale)
            log_probabilities = F.log_softmax(logits, dim=-1)
            chunk_weight = None if row_weight is None else row_weight[start : start + chunk_rows, None]
            target_log_probability = _weighted(log_probabilities.gather(1, target[:, None]), chunk_weight)
            if unsmoothed is not None:
                unsmoothed -= target_log_probability.sum()
                mean_log_probability = _weighted(log_probabilities.mean(-1, keepdim=True), chunk_weight)
                target_log_probability = (1 - smoothing) * target_log_probability + smoothing * mean_log_probability
            loss -= target_log_probability.sum()
            if groups is not None:
                loss_by_group.index_add_(0, groups[start : start + chunk_rows], -target_log_probability[:, 0].float())
            if not training:
                correct += _weighted((logits.argmax(dim=-1) == target)[:, None], chunk_weight).sum()
                continue
            grad = _product_gradient(logits, log_probabilities, target, softcap, scale, smoothing)
            grad = (grad if chunk_weight is None else grad.mul_(chunk_weight)).to(chunk.dtype)
            if grad_hidden is not None:
                torch.mm(grad, weight, out=grad_hidden[start : start + chunk_rows])
            if need_weight:
                grad_weight = _sum_of_products(grad_weight, grad, chunk)
            if grad_bias is not None:
                grad_bias += grad.float().sum(0)
        if (
            need_weight and grad_weight is None
        ):  # no supervised row here: the other ranks wait for a gradient all the same
            grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.mark_non_differentiable(correct, loss_by_group, *(() if unsmoothed is None else (unsmoothed,)))
        return loss, correct, loss_by_group, unsmoothed

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor) -> Any:  # type: ignore[override]
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        # Scaled in place, of which autograd keeps count: a second backward pass fails instead of scaling twice.
        return (
            None if grad_hidden is None else grad_hidden.mul_(grad_total.to(grad_hidden.dtype)),
            None if grad_weight is None else grad_weight.mul_(grad_total).to(ctx.weight_dtype),
            None if grad_bias is None else grad_bias.mul_(grad_total).to(ctx.weight_dtype),
            None,
            None,
            None,
        )


class _RowCrossEntropy(torch.autograd.Function):
    """Cross-entropy of each row of `hidden @ weight.T`, for losses that weigh rows by what all of them say together.

    The rows' weights are known in the backward pass only. What the hidden states need of it is a row's own gradient
    times its weight, so it is made in the forward pass; the head's own gradient sums over rows, and its logits are
    computed a second time, where the head trains at all.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, settings: HeadSettings
    ) -> Tensor:
        softcap, scale, training = settings
        chunk_rows = max(1, CHUNK_LOGITS // weight.shape[0])
        head_weight, weight = weight, weight.to(hidden.dtype)
        nll = hidden.new_empty(len(targets), dtype=torch.promote_types(hidden.dtype, torch.float32))
        grad_hidden = torch.empty_like(hidden) if training and ctx.needs_input_grad[0] else None
        for start in range(0, len(targets), chunk_rows):
            chunk, target = hidden[start : start + chunk_rows], targets[start : start + chunk_rows]
            logits = _logits(chunk, weight, bias, softcap, scale)
            log_probabilities = F.log_softmax(logits, dim=-1)
            nll[start : start + chunk_rows] = -log_probabilities.gather(1, target[:, None])[:, 0]
            if grad_hidden is not None:
                grad = _product_gradient(logits, log_probabilities, target, softcap, scale).to(chunk.dtype)
                torch.mm(grad, weight, out=grad_hidden[start : start + chunk_rows])
        head_trains = training and any(ctx.needs_input_grad[1:3])
        ctx.save_for_backward(grad_hidden, *((hidden, head_weight, bias, targets) if head_trains else ()))
        ctx.settings = softcap, scale, chunk_rows
        return nll

    @staticmethod
    def backward(ctx: Any, row_weight: Tensor) -> Any:  # type: ignore[override]
        grad_hidden, *saved_for_head = ctx.saved_tensors
        hidden_gradient = None if grad_hidden is None else grad_hidden * row_weight[:, None].to(grad_hidden.dtype)
        if not saved_for_head:
            return hidden_gradient, None, None, None, None
        hidden, weight, bias, targets = saved_for_head
        softcap, scale, chunk_rows = ctx.settings
        accumulation_dtype, head_dtype, weight = row_weight.dtype, weight.dtype, weight.to(hidden.dtype)
        grad_weight = torch.zeros_like(weight, dtype=accumulation_dtype) if ctx.needs_input_grad[1] else None
        grad_bias = (
            torch.zeros_like(bias, dtype=accumulation_dtype) if bias is not None and ctx.needs_input_grad[2] else None
        )
        for start in range(0, len(targets), chunk_rows):
            chunk, target = hidden[start : start + chunk_rows], targets[start : start + chunk_rows]
            logits = _logits(chunk, weight, bias, softcap, scale)
            grad = _product_gradient(logits, F.log_softmax(logits, dim=-1), target, softcap, scale)
            grad = grad * row_weight[start : start + chunk_rows, None]
            if grad_weight is not None:
                grad_weight += grad.to(chunk.dtype).T @ chunk
            if grad_bias is not None:
                grad_bias += grad.sum(0)
        return (
            hidden_gradient,
            None if grad_weight is None else grad_weight.to(head_dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
            None,
        )


class LossComparison(Protocol):
    """What is computed inside a head's call in place of the plain loss (`trainer/losses/divergence.py`)."""

    def __call__(self, head: LossHead, hidden: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        """Sums over rows of `hidden [N, H]` with `targets [N]`, the first of them with the gradient."""


class LossHead(nn.Linear):
    """A model's own output layer that, given targets, returns the loss (summed, or of each row) instead of logits."""

    softcap: float | None = None
    logit_scale: float = 1.0
    frozen_row: int | None = None
    """The row that is not to train."""

    @property
    def training_weight(self) -> Tensor:
        """The weight `[V, H]` as losses must use it."""
        if self.frozen_row is None or not self.weight.requires_grad:
            return self.weight
        return without_row(self.weight, self.frozen_row)

    @classmethod
    def replace(cls, head: nn.Linear, *, softcap: float | None, logit_scale: float) -> LossHead:
        """The same layer (the same Parameter objects) with the additional duty."""
        loss_head = cls.__new__(cls)
        loss_head.__dict__.update(head.__dict__)
        loss_head.softcap, loss_head.logit_scale = softcap, logit_scale
        return loss_head

    def forward(
        self,
        hidden: Tensor,
        targets: Tensor | None = None,
        *,
        counting: RowCounting | None = None,
        by_row: bool = False,
        added_bias: Tensor | None = None,
        against: LossComparison | None = None,
        lend: Callable[[], Any] | None = None,
    ) -> Any:
        """Logits `[..., V]`; or, with `targets [N]` for `hidden [N, H]`, (summed loss, number of correct argmaxes).

        The second is counted in evaluation only (zero while gradients are made): it would cost a pass over the logits.
        With `counting` rows have weights in both, and with groups the loss of each, `[num]`, is the third; with smoothing the
        loss without it is the last. With `by_row` the
        result is the negative log-likelihood of each row, `[N]`, float32; with `against` what that returns; with `lend` what
        that returns, called while the weight is whole. `added_bias [V]` is what the model adds to this layer's logits (it
        counts with targets only: without them the model adds it itself).
        """
        if lend is not None:
            return lend()
        if targets is None:
            return super().forward(hidden)
        if not hidden.is_meta and torch.is_autocast_enabled(hidden.device.type):
            hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
        if against is not None:
            return against(self, hidden, targets)
        training = torch.is_grad_enabled()  # inside the function it is always off
        settings = self.softcap, self.logit_scale, training
        bias: Tensor | None = self.bias
        if added_bias is not None:
            bias = added_bias if bias is None else bias + added_bias
        if by_row:
            return _RowCrossEntropy.apply(hidden, self.training_weight, bias, targets, settings)
        counting = counting or RowCounting()
        results = _LinearCrossEntropy.apply(hidden, self.training_weight, bias, targets, counting, settings)
        return _requested_results(results, counting)


def _requested_results(
    results: tuple[Tensor, Tensor, Tensor, Tensor | None], counting: RowCounting
) -> tuple[Tensor, ...]:
    """Of (loss, correct, by group, without smoothing) what was asked for."""
    loss, correct, loss_by_group, unsmoothed = results
    group_losses = (loss_by_group,) if counting.groups is not None else ()
    return (loss, correct, *group_losses, *(() if unsmoothed is None else (unsmoothed,)))


def computes_loss(head: nn.Module) -> bool:
    """Whether a model's head is a LossHead, perhaps one trained in full beside adapters."""
    if isinstance(head, LossHead):
        return True
    wrapped = getattr(head, "modules_to_save", None)
    return wrapped is not None and all(isinstance(m, LossHead) for m in wrapped.values())  # type: ignore[operator]


def logits_loss(logits: Tensor, targets: Tensor, counting: RowCounting | None = None) -> tuple[Tensor, ...]:
    """Summed loss and number of correct argmaxes of `logits [N, V]`, for heads that are not a plain linear layer.

    With `counting` as `LossHead` has them.
    """
    logits = logits.float()
    counting, correct = counting or RowCounting(), (logits.argmax(-1) == targets).float()
    if counting.weights is None and counting.groups is None and not counting.smoothing:
        return F.cross_entropy(logits, targets, reduction="sum"), correct.sum()
    unsmoothed = _weighted(F.cross_entropy(logits, targets, reduction="none"), counting.weights)
    nll, smoothing = unsmoothed, counting.smoothing
    if smoothing:
        nll = _weighted(F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing), counting.weights)
    loss_by_group = nll.new_zeros(counting.num)
    if counting.groups is not None:
        loss_by_group = loss_by_group.index_add(0, counting.groups, nll.detach())
    unsmoothed_sum = unsmoothed.detach().sum() if smoothing else None
    return _requested_results(
        (nll.sum(), _weighted(correct, counting.weights).sum(), loss_by_group, unsmoothed_sum), counting
    )

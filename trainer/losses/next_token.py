"""The output head fused with the next-token loss: logits exist only at supervised rows, and only a chunk at a time.

Under sharding nothing but the head's own forward pass may touch its weight: FSDP2 would mix plain and distributed tensors, and
ZeRO-3 shows an empty one. So the loss is computed by *calling the head as a module*.

In this file N is the number of rows (supervised positions of a micro-batch), n the rows of one chunk, H the size of a hidden
state, V the size of the vocabulary. With the weight W `[V, H]` and the bias b `[V]` of the head, the factor s and the soft cap
c, a row x has the *product* `z = W x + b` and the logits `l = c tanh(s z / c)`, or `l = s z` without a soft cap.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class RowWeighting:
    """How rows (positions with a target) count in the loss."""

    row_weights: Tensor | None = None
    """`[N]`: the weight of each row; None: each counts as 1."""
    row_groups: Tensor | None = None
    """int64 `[N]`: the group of each row, to report the loss of each group as well."""
    num_groups: int = 0
    smoothing: float = 0.0
    """Share of each target that is spread evenly over the vocabulary (Szegedy et al. 2016, arXiv:1512.00567, section 7)."""


class HeadSettings(NamedTuple):
    """How an output head turns products into logits, and whether it trains."""

    softcap: float | None
    """Soft cap of the logits; None if there is none."""
    logit_scale: float
    """Factor on the logits."""
    needs_gradients: bool


CHUNK_LOGITS = 2**25
"""Limit of logits in memory at one time (rows times vocabulary): 128 MiB in float32."""


def head_logits(chunk: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, scale: float) -> Tensor:
    """Compute the logits of hidden states `[n, H]`: `c tanh(s z / c)` with z = W x + b, `[n, V]`, in float32 or wider.

    `weight [V, H]`, `bias [V]`: W and b of the output head. `scale`: the factor s. `softcap`: c, a bound of Gemma and others;
    None: the logits are `s z`.
    """
    if bias is not None:
        bias = bias.to(chunk.dtype)
    logits = F.linear(chunk, weight.to(chunk.dtype), bias)  # z
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if scale != 1.0:
        logits = logits * scale
    if softcap is None:
        return logits
    return softcap * torch.tanh(logits / softcap)


def _nll_gradient_by_product(
    logits: Tensor,
    log_probabilities: Tensor,
    targets: Tensor,
    softcap: float | None,
    scale: float,
    smoothing: float = 0.0,
) -> Tensor:
    """Derivative of each row's own (smoothed) negative log-likelihood by the head's product z = W x + b, `[n, V]`.

    All gradients of the head follow from it by the chain rule. `logits [n, V]`: made of z by `scale` and `softcap`.
    `log_probabilities [n, V]`: of these logits; they are overwritten, because tensors over a large vocabulary are the largest
    of a step. `targets`: int64 `[n]`. `smoothing`: share e of each target that is spread evenly over the vocabulary.
    """
    # With p = softmax(l) and the smoothed target q = (1 - e) at the target token + e / V everywhere: dL/dl = p - q.
    grad = log_probabilities.exp_()  # p
    grad[torch.arange(len(targets), device=grad.device), targets] -= 1.0 - smoothing
    if smoothing:
        grad.sub_(smoothing / grad.shape[-1])
    # Chain rule for l = c tanh(s z / c): dl/dz = s (1 - tanh^2) = s (1 - (l / c)^2).
    if softcap is not None:
        grad.mul_(1.0 - (logits / softcap).square())
    return grad.mul_(scale) if scale != 1.0 else grad


def _add_weight_gradient(total: Tensor | None, grad: Tensor, chunk: Tensor) -> Tensor:
    """Add a chunk's gradient of the head's weight, `grad.T @ chunk` `[V, H]`, to the sum of the chunks before, and return it.

    `total`: this sum, in float32 or wider, changed in place; None for the first chunk. `grad [n, V]`: derivative of the loss by
    the product z. `chunk [n, H]`: hidden states.
    """
    if total is None:
        return (grad.T @ chunk).to(torch.promote_types(chunk.dtype, torch.float32))
    if total.dtype == chunk.dtype:
        return total.addmm_(grad.T, chunk)
    return total.add_(grad.T @ chunk)  # `addmm_` takes no mixed types, such as a float32 sum of bfloat16 products


def weight_rows(rows: Tensor, weight: Tensor | None) -> Tensor:
    """The values of rows, each times the weight of its row; `weight=None`: all weights are 1. Shapes must broadcast."""
    if weight is None:
        return rows
    return rows * weight


class _LinearCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy of the rows of `hidden` under the head, for a loss whose row weights are known beforehand.

    The forward pass also computes the gradients, chunk by chunk: a chunk's logits exist only then, and the backward pass would
    have to compute them again. Autograd calls `backward` with one number, by which the gradients are scaled.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        weighting: RowWeighting,
        settings: HeadSettings,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """(loss, correct argmaxes, loss by group, loss without smoothing or None): sums over the rows of `hidden [N, H]`.

        `weight [V, H]` and `bias [V]` are of the head; `targets [N]` is int64. Correct argmaxes are counted only in evaluation,
        without gradients. Saves for `backward`, of those that are needed: the gradients of the loss by hidden, weight and bias.
        """
        softcap = settings.softcap
        scale = settings.logit_scale
        training = settings.needs_gradients
        row_weights = weighting.row_weights
        row_groups = weighting.row_groups
        smoothing = weighting.smoothing
        need_hidden = training and ctx.needs_input_grad[0]
        need_weight = training and ctx.needs_input_grad[1]
        need_bias = training and ctx.needs_input_grad[2]
        chunk_rows = max(1, CHUNK_LOGITS // weight.shape[0])
        ctx.weight_dtype = weight.dtype
        weight = weight.to(hidden.dtype)  # once: a cast takes as long as the products of a chunk

        # Sums over all chunks.
        loss = hidden.new_zeros((), dtype=torch.float32)
        correct = hidden.new_zeros((), dtype=torch.float32)
        loss_by_group = hidden.new_zeros(weighting.num_groups, dtype=torch.float32)
        unsmoothed = hidden.new_zeros((), dtype=torch.float32) if smoothing else None
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight: Tensor | None = None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if need_bias and bias is not None else None
        for start in range(0, hidden.shape[0], chunk_rows):
            chunk = hidden[start : start + chunk_rows]
            chunk_targets = targets[start : start + chunk_rows]
            # The chunk's loss: -log p(target) of each of its n rows, times the row's weight.
            logits = head_logits(chunk, weight, bias, softcap, scale)  # [n, V]
            log_probabilities = F.log_softmax(logits, dim=-1)  # [n, V]
            chunk_weights = None if row_weights is None else row_weights[start : start + chunk_rows, None]
            target_log_probability = weight_rows(
                log_probabilities.gather(1, chunk_targets[:, None]), chunk_weights
            )  # [n, 1]
            if unsmoothed is not None:
                # Smoothed by e: (1 - e) log p(target) + e * mean of log p over the vocabulary.
                unsmoothed -= target_log_probability.sum()
                mean_log_probability = weight_rows(log_probabilities.mean(-1, keepdim=True), chunk_weights)
                target_log_probability = (1 - smoothing) * target_log_probability + smoothing * mean_log_probability
            loss -= target_log_probability.sum()
            if row_groups is not None:
                loss_by_group.index_add_(
                    0, row_groups[start : start + chunk_rows], -target_log_probability[:, 0].float()
                )
            if not training:
                correct += weight_rows((logits.argmax(dim=-1) == chunk_targets)[:, None], chunk_weights).sum()
                continue

            # The chunk's gradients, from G = dL/dz [n, V], each row times its weight:
            # dL/dx = G W, dL/dW = G^T x, dL/db = sum of G over the rows.
            grad_product = _nll_gradient_by_product(logits, log_probabilities, chunk_targets, softcap, scale, smoothing)
            if chunk_weights is not None:
                grad_product.mul_(chunk_weights)
            grad_product = grad_product.to(chunk.dtype)
            if grad_hidden is not None:
                torch.mm(grad_product, weight, out=grad_hidden[start : start + chunk_rows])  # [n, V] [V, H]
            if need_weight:
                grad_weight = _add_weight_gradient(grad_weight, grad_product, chunk)
            if grad_bias is not None:
                grad_bias += grad_product.float().sum(0)
        if need_weight and grad_weight is None:
            # No supervised row on this rank: a gradient of zeros, since the other ranks wait for it in the reduction.
            grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        logged_sums = [correct, loss_by_group]  # they have no gradient
        if unsmoothed is not None:
            logged_sums.append(unsmoothed)
        ctx.mark_non_differentiable(*logged_sums)
        return loss, correct, loss_by_group, unsmoothed

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor) -> Any:  # type: ignore[override]
        """The gradients of hidden `[N, H]`, weight `[V, H]` and bias `[V]`: those of the forward pass, times `grad_total`.

        `grad_total`: 0-d, derivative of the step's loss by the sum that `forward` returned, such as 1 / (number of targets).
        """
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        # Scaled in place. Autograd counts that as a change: a second backward pass fails instead of scaling twice.
        if grad_hidden is not None:
            grad_hidden = grad_hidden.mul_(grad_total.to(grad_hidden.dtype))
        if grad_weight is not None:
            grad_weight = grad_weight.mul_(grad_total).to(ctx.weight_dtype)
        if grad_bias is not None:
            grad_bias = grad_bias.mul_(grad_total).to(ctx.weight_dtype)
        # None for the inputs of `forward` that are no trained tensors: targets, weighting and settings.
        return grad_hidden, grad_weight, grad_bias, None, None, None


class _RowCrossEntropy(torch.autograd.Function):
    """Cross-entropy of each row, for losses in which the weight of a row depends on other rows (preferences, policies).

    The weights w of the rows are known only in the backward pass. With G = dL/dz of each row's own loss:
    - hidden states: dL/dx = w (G W), so G W is computed in the forward pass, and multiplied by w in the backward pass.
    - weight of the head: dL/dW = sum over rows of w G^T x, for which the logits are computed a second time, if the head trains.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        settings: HeadSettings,
        with_entropy: bool = False,
    ) -> Any:
        """The negative log-likelihood of each row's target, `[N]`, in float32 or wider.

        `with_entropy`: also returns the entropy in nats of each row's distribution, `[N]`, which has no gradient. Rows are
        processed in chunks, so that about `CHUNK_LOGITS` logits exist at a time.

        Saves for `backward` G W, the derivative of each row's own loss by its hidden state, `[N, H]`; and the inputs, if the
        head trains.
        """
        softcap = settings.softcap
        scale = settings.logit_scale
        training = settings.needs_gradients
        chunk_rows = max(1, CHUNK_LOGITS // weight.shape[0])
        head_weight = weight  # in its own type, for the backward pass
        weight = weight.to(hidden.dtype)
        nll = hidden.new_empty(len(targets), dtype=torch.promote_types(hidden.dtype, torch.float32))
        entropy = torch.empty_like(nll) if with_entropy else None
        grad_hidden = torch.empty_like(hidden) if training and ctx.needs_input_grad[0] else None
        for start in range(0, len(targets), chunk_rows):
            chunk = hidden[start : start + chunk_rows]
            chunk_targets = targets[start : start + chunk_rows]
            logits = head_logits(chunk, weight, bias, softcap, scale)  # [n, V]
            log_probabilities = F.log_softmax(logits, dim=-1)  # [n, V]
            nll[start : start + chunk_rows] = -log_probabilities.gather(1, chunk_targets[:, None])[:, 0]
            if entropy is not None:
                # -sum of p log p over the vocabulary. Logits are finite, so p log p needs no care at p = 0.
                p_log_p = log_probabilities.exp().mul_(log_probabilities)
                entropy[start : start + chunk_rows] = -p_log_p.sum(-1)
            if grad_hidden is not None:
                grad_product = _nll_gradient_by_product(logits, log_probabilities, chunk_targets, softcap, scale)
                torch.mm(
                    grad_product.to(chunk.dtype), weight, out=grad_hidden[start : start + chunk_rows]
                )  # G W, [n, H]
        head_trains = training and any(ctx.needs_input_grad[1:3])
        if head_trains:
            ctx.save_for_backward(grad_hidden, hidden, head_weight, bias, targets)
        else:
            ctx.save_for_backward(grad_hidden)
        ctx.settings_and_chunk_rows = settings, chunk_rows
        if entropy is None:
            return nll
        ctx.mark_non_differentiable(entropy)
        return nll, entropy

    @staticmethod
    def backward(ctx: Any, row_weights: Tensor, *_: Tensor) -> Any:  # type: ignore[override]
        """The gradients of hidden `[N, H]`, weight `[V, H]` and bias `[V]`; None for those that do not train.

        `row_weights [N]`: derivative of the step's loss by the loss of each row, which autograd passes in. It is w in the
        formulas of this class.
        """
        # G W of each row, from the forward pass; and what the head's gradients are made of, if it trains.
        grad_hidden_of_rows, *saved_for_head = ctx.saved_tensors
        grad_hidden = None
        if grad_hidden_of_rows is not None:
            grad_hidden = grad_hidden_of_rows * row_weights[:, None].to(grad_hidden_of_rows.dtype)
        if not saved_for_head:  # the head does not train
            return grad_hidden, None, None, None, None, None

        hidden, weight, bias, targets = saved_for_head
        settings, chunk_rows = ctx.settings_and_chunk_rows
        softcap = settings.softcap
        scale = settings.logit_scale
        head_dtype = weight.dtype
        weight = weight.to(hidden.dtype)
        grad_weight: Tensor | None = None
        grad_bias: Tensor | None = None
        if ctx.needs_input_grad[1]:
            grad_weight = torch.zeros_like(weight, dtype=row_weights.dtype)
        if bias is not None and ctx.needs_input_grad[2]:
            grad_bias = torch.zeros_like(bias, dtype=row_weights.dtype)
        for start in range(0, len(targets), chunk_rows):
            chunk = hidden[start : start + chunk_rows]
            chunk_targets = targets[start : start + chunk_rows]
            logits = head_logits(chunk, weight, bias, softcap, scale)  # [n, V], as in the forward pass
            grad_product = _nll_gradient_by_product(
                logits, F.log_softmax(logits, dim=-1), chunk_targets, softcap, scale
            )
            grad_product = grad_product * row_weights[start : start + chunk_rows, None]  # w G
            if grad_weight is not None:
                grad_weight += grad_product.to(chunk.dtype).T @ chunk  # [V, n] [n, H]
            if grad_bias is not None:
                grad_bias += grad_product.sum(0)
        if grad_weight is not None:
            grad_weight = grad_weight.to(head_dtype)
        if grad_bias is not None:
            grad_bias = grad_bias.to(bias.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None


class _FreezeRow(torch.autograd.Function):
    """The identity for a weight `[V, H]`; in the backward pass the gradient of one of its rows is set to 0."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, row: int) -> Tensor:
        ctx.row = row
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        grad = grad.clone()
        grad[ctx.row] = 0
        return grad, None


class LossComparison(Protocol):
    """Computes another loss than the plain one inside a head's call, such as `trainer/losses/divergence.py`."""

    def __call__(self, head: LossHead, hidden: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        """Sums over the rows of `hidden [N, H]` with `targets [N]`. Gradients flow through the first of them."""


class LossHead(nn.Linear):
    """A model's own output layer. If it is given targets, it returns the loss (summed, or of each row) instead of logits."""

    softcap: float | None = None
    logit_scale: float = 1.0
    frozen_row: int | None = None
    """The row of the weight that does not train; None if all rows do."""

    @property
    def training_weight(self) -> Tensor:
        """The weight `[V, H]` for losses: a frozen row gets no gradient."""
        if self.frozen_row is None or not self.weight.requires_grad:
            return self.weight
        return _FreezeRow.apply(self.weight, self.frozen_row)  # type: ignore[no-any-return]

    @classmethod
    def of_linear(cls, head: nn.Linear, *, softcap: float | None, logit_scale: float) -> LossHead:
        """A LossHead in the place of `head`, with the same Parameter objects (they may be tied)."""
        loss_head = cls.__new__(cls)
        loss_head.__dict__.update(head.__dict__)
        loss_head.softcap = softcap
        loss_head.logit_scale = logit_scale
        return loss_head

    def forward(
        self,
        hidden: Tensor,
        targets: Tensor | None = None,
        *,
        weighting: RowWeighting | None = None,
        by_row: bool = False,
        added_bias: Tensor | None = None,
        comparison: LossComparison | None = None,
        call_while_gathered: Callable[[], Any] | None = None,
    ) -> Any:
        """Without `targets` logits `[..., V]`. With `targets [N]` for `hidden [N, H]`: (summed loss, correct argmaxes).

        Argmaxes are counted only in evaluation (0 while gradients are made), because that costs a pass over the logits.

        - `weighting`: weights of rows, which hold for both results. With groups, the loss of each group `[num]` is a third
          result. With smoothing, the loss without smoothing is the last one.
        - `by_row`: return the negative log-likelihood of each row instead, `[N]`, float32.
        - `comparison`: return what this computes for the rows instead, such as a divergence from a teacher.
        - `call_while_gathered`: call this while the weight is gathered, and return what it returns.
        - `added_bias [V]`: what the model adds to this layer's logits. Only with targets: otherwise the model adds it itself.
        """
        if call_while_gathered is not None:
            return call_while_gathered()
        if targets is None:
            return super().forward(hidden)
        if not hidden.is_meta and torch.is_autocast_enabled(hidden.device.type):
            hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
        if comparison is not None:
            return comparison(self, hidden, targets)
        # Gradients are asked for here: inside an autograd function they are always off.
        settings = HeadSettings(self.softcap, self.logit_scale, needs_gradients=torch.is_grad_enabled())
        bias = self._bias_with(added_bias)
        if by_row:
            return _RowCrossEntropy.apply(hidden, self.training_weight, bias, targets, settings)
        weighting = weighting or RowWeighting()
        sums = _LinearCrossEntropy.apply(hidden, self.training_weight, bias, targets, weighting, settings)
        return _tuple_of_asked_sums(_LossSums(*sums), weighting)

    def _bias_with(self, added_bias: Tensor | None) -> Tensor | None:
        """The sum of this layer's bias and `added_bias`, `[V]`; None if there is neither."""
        bias: Tensor | None = self.bias
        if bias is None:
            return added_bias
        return bias if added_bias is None else bias + added_bias


class _LossSums(NamedTuple):
    """Sums over rows, weighted. Only `loss` has a gradient."""

    loss: Tensor
    """0-d."""
    correct: Tensor
    """Correct argmaxes, 0-d."""
    loss_by_group: Tensor
    """`[num_groups]`, empty without groups."""
    unsmoothed: Tensor | None
    """The loss without label smoothing, 0-d; None if labels are not smoothed."""


def _tuple_of_asked_sums(sums: _LossSums, weighting: RowWeighting) -> tuple[Tensor, ...]:
    """Pick the sums that a caller asked for: (loss, correct), then the loss of each group if there are groups, then the loss
    without smoothing if there is smoothing.

    A plain tuple without None: wrappers of modules copy what a head returns, and look for tensors in it.
    """
    asked = [sums.loss, sums.correct]
    if weighting.row_groups is not None:
        asked.append(sums.loss_by_group)
    if sums.unsmoothed is not None:
        asked.append(sums.unsmoothed)
    return tuple(asked)


def computes_loss(head: nn.Module) -> bool:
    """Whether a model's head is a LossHead, so that it can be called with targets.

    If the head trains in full beside adapters, peft has wrapped it, and each of its copies must be one.
    """
    if isinstance(head, LossHead):
        return True
    trained_copies = getattr(head, "modules_to_save", None)  # peft's, by the adapter's name
    return trained_copies is not None and all(isinstance(copy, LossHead) for copy in trained_copies.values())  # type: ignore[operator]


def logits_loss(logits: Tensor, targets: Tensor, weighting: RowWeighting | None = None) -> tuple[Tensor, ...]:
    """Sum the loss of `logits [N, V]` for heads that are not a plain linear layer, as `LossHead.forward` does for others.

    Returns (summed loss, correct argmaxes). Further results follow: the loss of each group if `weighting` has groups, then the
    loss without smoothing if it smooths.
    """
    logits = logits.float()
    weighting = weighting or RowWeighting()
    correct = (logits.argmax(-1) == targets).float()
    if weighting.row_weights is None and weighting.row_groups is None and not weighting.smoothing:
        return F.cross_entropy(logits, targets, reduction="sum"), correct.sum()
    unsmoothed = weight_rows(F.cross_entropy(logits, targets, reduction="none"), weighting.row_weights)
    row_losses = unsmoothed
    smoothing = weighting.smoothing
    if smoothing:
        smoothed = F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)
        row_losses = weight_rows(smoothed, weighting.row_weights)
    loss_by_group = row_losses.new_zeros(weighting.num_groups)
    if weighting.row_groups is not None:
        loss_by_group = loss_by_group.index_add(0, weighting.row_groups, row_losses.detach())
    sums = _LossSums(
        loss=row_losses.sum(),
        correct=weight_rows(correct, weighting.row_weights).sum(),
        loss_by_group=loss_by_group,
        unsmoothed=unsmoothed.detach().sum() if smoothing else None,
    )
    return _tuple_of_asked_sums(sums, weighting)

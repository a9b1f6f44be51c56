"""Operations on lists of tensors, and the functional parts of torch's optimizers.

Read in torch 2.13.0 and 2.15.0. torch's own optimizers are made of the `_foreach_*` operations, one kernel for a list of tensors;
they have no public names. They are re-exported, not wrapped.
"""

from __future__ import annotations

import torch
from torch.optim._adafactor import adafactor
from torch.optim._muon import _adjust_lr, _zeropower_via_newtonschulz

__all__ = ["adafactor"]
"""`adafactor(...)`: the update of `torch.optim.Adafactor` on lists of tensors."""

adjusted_rate = _adjust_lr
"""`adjusted_rate(rate, how, shape)`: the learning rate of Muon for a matrix of this shape."""

orthogonalised_in_bf16 = _zeropower_via_newtonschulz
"""`orthogonalised_in_bf16(matrix, coefficients, iterations, eps)`: Muon's iteration of Newton and Schulz."""

add_each = torch._foreach_add_
"""`add_each(tensors, others, alpha=a)`: add `a` times the others in place."""

copy_each = torch._foreach_copy_
"""`copy_each(tensors, sources)`: overwrite in place."""

multiply_each = torch._foreach_mul_
"""`multiply_each(tensors, factor)`: multiply by a number or a tensor of one element, in place."""

norm_of_each = torch._foreach_norm
"""`norm_of_each(tensors)`: the Euclidean norms, a list. `torch.nn.utils.get_total_norm` gives their norm alone."""

product_of_each = torch._foreach_mul
"""`product_of_each(tensors, factor)`: new tensors."""

take_sign_of_each = torch._foreach_sign_
"""`take_sign_of_each(tensors)`: -1, 0 or 1 for each element, in place."""

"""Tensors without memory, and what a cache of their operations reads and builds (`torch._subclasses.fake_tensor`).

Read in torch 2.13.0 and 2.15.0. There is no public address for fake tensors. The names below are called thousands of times a
plan: they are torch's own functions, re-exported. Nothing public is as fast: a fake tensor by its constructor takes three times
as long as `make_subclass`.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily

__all__ = ["FakeTensor", "FakeTensorMode", "unset_fake_temporarily"]

FAKE_MODE = torch._C._TorchDispatchModeKey.FAKE
"""Which of the modes that torch keeps a place for: `mode_at_work(FAKE_MODE)` is the `FakeTensorMode` at work, or None."""

mode_at_work = torch._C._get_dispatch_mode

default_device_at_work = torch._C._get_default_device
"""The device of tensors made anew; the public `torch.get_default_device` makes a tensor to find out."""

make_subclass = torch.Tensor._make_subclass
"""`make_subclass(FakeTensor, meta_tensor, ...)`: as the constructor of `FakeTensor` does it."""

warn_when_pointer_is_read = torch._C._set_warn_deprecated_on_mutable_data_ptr
refuse_when_pointer_is_read = torch._C._set_throw_on_mutable_data_ptr
"""What happens when somebody asks a fake tensor for the address of its memory; the mode decides which of the two."""

pointer_may_be_read: Callable[[FakeTensorMode], bool] = attrgetter("_allow_unsafe_data_ptr_access")

dispatch_keys = torch._C._dispatch_key_set
"""The keys by which the dispatcher treats a tensor: two tensors that agree in them are computed with alike."""

operation_name: Callable[[Any], str] = attrgetter("_opname")
"""`operation_name(op)`: `add` of `aten::add.Tensor`. `op.name()`, which is public, would have to be cut up each time."""

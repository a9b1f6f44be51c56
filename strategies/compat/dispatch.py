"""Operations of torch as its dispatcher sees them: modes, names of operations, identities of storages.

Read in torch 2.13.0 and 2.15.0. What is called once an operation is re-exported here, not wrapped: a call of Python more for
each of them would slow plans down.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

import torch
from torch._guards import active_fake_mode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["TorchDispatchMode", "active_fake_mode", "tree_leaves"]
"""`TorchDispatchMode` is documented, and has no other address than `torch.utils._python_dispatch`.

`active_fake_mode()` is the `FakeTensorMode` at work, or None. `torch._guards` is loaded with torch itself; `torch._subclasses`,
where the mode is, would import sympy. `tree_leaves(x)` are the leaves of nested lists, tuples and dicts; torch has no public
address for them.
"""

storage_key: Callable[[torch.UntypedStorage], int] = attrgetter("_cdata")
"""`storage_key(storage)`: the address of a storage's object in C++ (`UntypedStorage._cdata`), unique while the storage lives.

`data_ptr()`, which is public, is 0 for every storage without memory.
"""

local_part: Callable[[Any], torch.Tensor] = attrgetter("_local_tensor")
"""`local_part(dtensor)`: this rank's part of a distributed tensor. The public `to_local` is an operation, which a count sees."""

operation_schema: Callable[[Any], Any] = attrgetter("_schema")
"""`operation_schema(op)`: the declaration of an operation with names of its arguments (`OpOverload._schema`)."""

within_no_dispatch_mode = torch._C._DisableTorchDispatch
"""`with within_no_dispatch_mode()`: neither modes nor subclasses of tensors see what is called. No public guard does that."""

within_no_function_mode = torch._C.DisableTorchFunction
"""`with within_no_function_mode()`: neither function modes nor `__torch_function__` of subclasses see what is called."""

run_backward = torch.autograd.graph._engine_run_backward
"""The last call that `torch.autograd.backward` makes, and the first below what a `TorchFunctionMode` intercepts."""


def onednn_multiplies_in_bf16() -> bool:
    """Whether oneDNN may multiply in bf16 on this processor; `torch.backends.mkldnn` says only whether oneDNN is there."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@contextmanager
def resizes_reported(report: Callable[[torch.UntypedStorage], None]) -> Iterator[None]:
    """Report each change of a storage's size inside the context: `report(storage)` is called after `storage.resize_(...)`.

    FSDP2 frees and refills its gathered buffers by resizing them. `torch.UntypedStorage.resize_` is replaced, since it is a
    method and not an operation: neither a dispatch mode nor a function mode sees it.
    """
    original_resize = torch.UntypedStorage.resize_

    def resize_and_report(storage: Any, size: int) -> Any:
        resized = original_resize(storage, size)
        report(storage)
        return resized

    torch.UntypedStorage.resize_ = resize_and_report  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        torch.UntypedStorage.resize_ = original_resize  # type: ignore[method-assign,assignment]


def mark_constant_when_compiled(function: Callable[..., Any]) -> None:
    """Let the compiler call `function` once and take its result for a constant.

    Sets `_dynamo_marked_constant`, as the public `torch.compiler.assume_constant_result` does after loading the compiler.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]


# -- operations whose names are private, though everybody's attention and casts run through them ------------------------------

FLASH_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention
FLASH_ATTENTION_ON_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
EFFICIENT_ATTENTION = torch.ops.aten._scaled_dot_product_efficient_attention
CUDNN_ATTENTION = torch.ops.aten._scaled_dot_product_cudnn_attention
ATTENTION_BY_PRODUCTS = torch.ops.aten._scaled_dot_product_attention_math
"""The kernels behind `scaled_dot_product_attention`: a mode sees these, never the public function."""

GROUPED_PRODUCT = torch.ops.aten._grouped_mm
"""What `torch.nn.functional.grouped_mm` calls."""

CAST = torch.ops.aten._to_copy
"""What `Tensor.to` calls when it copies."""

READ_ON_HOST = torch.ops.aten._local_scalar_dense
"""What `Tensor.item` calls."""

RESHAPED_IN_PLACE = torch.ops.aten._unsafe_view
"""`RESHAPED_IN_PLACE(tensor, shape)`: a view that autograd takes for a tensor of its own, so that a caller may overwrite it."""

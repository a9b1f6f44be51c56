"""What `torch.nn.Module` keeps for itself.

Read in torch 2.13.0 and 2.15.0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from operator import attrgetter
from typing import Any

from torch import Tensor, nn

own_parameters: Callable[[nn.Module], dict[str, nn.Parameter | None]] = attrgetter("_parameters")
"""`own_parameters(module)`: the dict in which a module keeps its parameters, those that are None too.

To write into it skips `__setattr__`, by which quantised layers, LSTMs and DeepSpeed's modules do more than keep. The public
`named_parameters(recurse=False)` leaves out what is None and what has a second name.
"""

own_buffers: Callable[[nn.Module], dict[str, Tensor | None]] = attrgetter("_buffers")
"""`own_buffers(module)`: the dict of a module's buffers, likewise."""

own_modules: Callable[[nn.Module], dict[str, nn.Module | None]] = attrgetter("_modules")
"""`own_modules(module)`: the dict of a module's children, likewise."""

lstm_weight_names: Callable[[nn.LSTM], list[str]] = attrgetter("_flat_weights_names")
"""`lstm_weight_names(lstm)`: names of its weights in the order in which cuDNN wants them; `all_weights` has no names."""


def set_lstm_weights(lstm: nn.LSTM, weights: list[Any]) -> None:
    """Give an LSTM the tensors for its next pass (`_flat_weights`): it keeps a list of those that it was built with."""
    lstm._flat_weights = weights


def persistent_buffers(model: nn.Module, *, remove_duplicate: bool = True) -> Iterator[tuple[str, Tensor]]:
    """(name, buffer) of the buffers that `model.state_dict()` has; with `remove_duplicate=False` under all names of a module.

    Which buffers are persistent is in `_non_persistent_buffers_set`; `state_dict` itself would gather what is sharded.
    """
    for owner_name, owner in model.named_modules(remove_duplicate=remove_duplicate):
        for key, buffer in owner._buffers.items():
            if buffer is not None and key not in owner._non_persistent_buffers_set:
                yield f"{owner_name}.{key}".removeprefix("."), buffer


def replace_buffers(model: nn.Module, make: Callable[[Tensor], Tensor]) -> None:
    """Replace every buffer of `model` by `make(buffer)`."""
    for owner in model.modules():
        for name, buffer in owner._buffers.items():
            if buffer is not None:
                owner._buffers[name] = make(buffer)


def is_compiled(module: nn.Module) -> bool:
    """Whether `module.compile()` was called (`_compiled_call_impl`); torch has no public question for it."""
    return module._compiled_call_impl is not None


def disable_device_moves(module: nn.Module) -> None:
    """Let `module.to(...)` and similar methods do nothing (`_apply`): moving fake parameters to their own device fails."""
    module._apply = lambda fn, recurse=True: module  # type: ignore[method-assign, assignment]

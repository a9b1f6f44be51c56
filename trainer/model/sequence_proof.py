"""Proves that an architecture may be cut along the sequence: that its tokens meet in attention and nowhere else.

Ranks that share a row (`parallel.sequence`) each hold a slice of its tokens. They exchange slices for heads around
attention, so attention sees the whole row. Everything else in the model sees the slice alone. A convolution, a
recurrence, a token shift or a position counted from the slice's first token would be wrong there without an error.

The proof replaces attention by a function in which each token looks at itself alone. Then no token may depend on another, so
what the model computes of a slice must be the slice of what it computes of the whole row. No list of architectures is needed,
and models that are not yet published are covered. The proof does not see what only long rows reach (the lengths at which
LongRoPE and dynamic RoPE change), nor masks and noise that are made of whole rows: `rotary.py`, `flex.py` and `noise.py` do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from trainer.model.sequence_attention import SINK_NAMES, UNSUPPORTED_INPUTS

TOKEN_LOCAL_ATTENTION = "shardtune_token_local"
"""transformers' name of the attention in which each token sees itself alone."""
MAX_SLICE_DIFFERENCE = 1e-6
"""Largest difference of an element, relative to the largest element of the row.

Architectures that may be cut stay below 1e-14 in float64, and below 2e-7 if their routers compute in float32 whatever they
are told. Those that may not differ by 5e-2 and more."""
MAX_SLICE_DIFFERENCE_IN_FLOAT32 = 1e-5
"""The same for an architecture whose code does not run in float64."""
CUT_SHARES = ((0.5,), (0.02, 0.3, 0.8))
"""Where the row is cut, as shares of its length: in two equal slices, and in four of which one is a single token."""
TOKENS_MEET_OUTSIDE_ATTENTION = "its tokens meet outside attention"
"""How the reason begins if what is computed of a slice is not the slice of what is computed of the row."""
ROW_INPUTS = ("input_ids", "position_ids")
"""What of a model's inputs is cut with the row: `[1, T]`. Everything else describes the whole row."""


class CannotBeCut(Exception):
    """A model that does not give its attention what the exchange needs; says what."""


class TokenLocalAttention:
    """A probe in place of attention: each token sees itself alone, and the settings of each call are recorded.

    In a model with this attention, a token that depends on another one does so outside attention.
    """

    def __init__(self) -> None:
        self.settings_of_calls: list[dict[str, float]] = []
        """The numbers among the arguments of each call (scaling, window, whether it is causal), in order."""

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """Attention in which each token sees itself alone: q `[1, H, T, D]`, k and v `[1, G, T, D]` -> `[1, T, H, D]`.

        That is each token's value, scaled by a score of its own query and key. `kwargs`: what models hand to attention; numbers
        and flags among them are recorded. Raises CannotBeCut if the model does not hand on the row's slices, or gives an input
        that ranks do not exchange.
        """
        if kwargs.get("row_slices") is None:
            raise CannotBeCut("its attention is not told how the row is cut (it does not hand on unknown arguments)")
        for name in UNSUPPORTED_INPUTS:
            if kwargs.get(name) is not None:
                raise CannotBeCut(f"its attention is given a {name}, which is not exchanged")
        settings = {name: value for name, value in kwargs.items() if isinstance(value, bool | int | float)}
        self.settings_of_calls.append(settings)
        groups = query.shape[1] // key.shape[1]
        key = key.repeat_interleave(groups, dim=1)
        value = value.repeat_interleave(groups, dim=1)
        # The product of a query with its own key is the same at every position of a rotary embedding. Fixed weights of each
        # dimension make the score depend on the position too, so that positions counted from the slice are found out.
        dimensions = torch.arange(query.shape[-1], device=query.device, dtype=query.dtype).cos()
        scores = (query * key + (query + key) * dimensions).sum(-1) * 0.1
        for name in SINK_NAMES:
            if kwargs.get(name) is not None:
                scores = scores + kwargs[name].reshape(1, -1, 1)
        return (torch.tanh(scores).unsqueeze(-1).to(value.dtype) * value).transpose(1, 2).contiguous(), None


def register_token_local_attention() -> TokenLocalAttention:
    """Make a new `TokenLocalAttention` known to transformers under `TOKEN_LOCAL_ATTENTION`, and return it."""
    from transformers import AttentionInterface

    attention = TokenLocalAttention()
    AttentionInterface.register(TOKEN_LOCAL_ATTENTION, attention)  # type: ignore[arg-type]
    return attention


def sequence_problem(
    forward: Callable[[dict[str, Any]], Tensor], row: dict[str, Any], attention: TokenLocalAttention
) -> str | None:
    """Prove that a model computes the same of a row's slices as of the whole row.

    Returns why not, as text that can follow its name; None if it does. Then ranks may share rows (sequence parallelism). The
    row is computed as a whole, then cut in several ways, slice by slice. Both have to agree, and so have the settings (scaling,
    window) that each call of attention is given.

    `forward` runs a model that was built with `TOKEN_LOCAL_ATTENTION`, in which a token sees itself alone, and returns its
    states `[T, width]`. `attention` is that attention, which records its calls. `row`: the inputs of a row of several documents
    without padding. Raises what the model raises.
    """
    length = row["input_ids"].shape[1]
    whole = _forward_pass(forward, row, 0, length, [0, length])
    expected_settings = list(attention.settings_of_calls)
    if not expected_settings:
        return "it does not call its attention through transformers' interface"
    if not whole.isfinite().all():
        return "a small copy with random weights computes what is no number"
    tolerance = MAX_SLICE_DIFFERENCE if whole.dtype is torch.float64 else MAX_SLICE_DIFFERENCE_IN_FLOAT32
    worst = 0.0
    for row_slices in _cuts(length):  # such as [0, 5, 16]: two slices
        for start, stop in pairwise(row_slices):
            attention.settings_of_calls.clear()
            part = _forward_pass(forward, row, start, stop, row_slices)
            if attention.settings_of_calls != expected_settings:
                return "the settings of its attention depend on the slice's length"
            difference = float((part - whole[start:stop]).abs().max() / whole.abs().max())
            worst = max(worst, difference)
    if worst <= tolerance:
        return None
    return f"{TOKENS_MEET_OUTSIDE_ATTENTION} (a slice of a row differs by {worst:.1e} from the slice of the whole row)"


def _cuts(length: int) -> Iterator[list[int]]:
    """Yield the borders of slices for each way in which the row is cut, such as [0, 8, 16] for two equal slices of 16 tokens."""
    for shares in CUT_SHARES:
        inner_borders = [max(1, int(share * length)) for share in shares]
        yield [0, *inner_borders, length]


def _forward_pass(
    forward: Callable[[dict[str, Any]], Tensor], row: dict[str, Any], start: int, stop: int, row_slices: list[int]
) -> Tensor:
    """The states of the tokens [start, stop) of a row, `[stop - start, width]`, from these tokens alone, as a rank computes them.

    `row_slices`: the borders of all slices, [0, 5, 16] for two, which the model hands on to its attention. Raises CannotBeCut
    for an output of another length.
    """
    inputs = dict(row)
    for name in ROW_INPUTS:
        if name in row:
            inputs[name] = row[name][:, start:stop]
    inputs["row_slices"] = row_slices
    with torch.no_grad():
        output = forward(inputs)
    if len(output) != stop - start:
        raise CannotBeCut(f"it computes {len(output)} rows of {stop - start} tokens")
    return output

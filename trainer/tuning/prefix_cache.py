"""A key-value cache that only reads: a prefix before every document, also where blocks are recomputed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def prefix_cache(by_layer: Tensor) -> Any:
    """A transformers Cache of a prefix `[layers, 2 (keys, values), B, heads, P, width]`.

    A cache as transformers makes it grows with every call, so that a block that is recomputed would meet its own keys.
    """
    from transformers.cache_utils import Cache, DynamicLayer

    class Prefix(DynamicLayer):
        """One layer: what it is given comes back behind the prefix, and is not kept."""

        def __init__(self, keys: Tensor, values: Tensor) -> None:
            super().__init__()
            self.keys, self.values, self.is_initialized = keys, values, True

        def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
            """Keys and values `[B, heads, P + T, width]`."""
            keys, values = self.keys.to(key_states.dtype), self.values.to(value_states.dtype)  # type: ignore[union-attr]
            return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)

    return Cache(layers=[Prefix(keys, values) for keys, values in by_layer])

"""Puts virtual tokens before the inputs of a decoder and removes their rows from its output, by hooks on the decoder.

The caller of the model sees documents as they are: no index shifts, and generation keeps the tokens in its cache.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trainer.tuning.compat.transformers import recompute_with_cache
from trainer.tuning.own_adapters import is_causal


@dataclass(frozen=True, slots=True)
class PrefixShape:
    """How the encoder's output for a prefix is cut: `tokens x (layers * 2 * heads * width of a head)`."""

    layers: int
    heads: int


class Prepend:
    """The running forward pass of one decoder; `active()` is asked at its beginning."""

    def __init__(
        self,
        decoder: nn.Module,
        encoder: nn.Module,
        embeddings: nn.Module,
        tokens: int,
        prefix: PrefixShape | None,
        active: Callable[[], bool] = lambda: True,
    ) -> None:
        self.encoder, self.embeddings, self.tokens, self.prefix, self.active = (
            encoder,
            embeddings,
            tokens,
            prefix,
            active,
        )
        self.words = list(inspect.signature(decoder.forward).parameters)
        self.cache_word = cache_word(decoder)
        self.strips = is_causal(decoder)
        """An encoder for classification is asked for its first row, which is a virtual token's under peft too."""
        self.added = 0
        """Rows that the running pass has more than its caller knows."""
        decoder.register_forward_pre_hook(self._before, with_kwargs=True)
        decoder.register_forward_hook(self._after)
        if prefix is not None:
            # The cache of a prefix only reads, so that recomputing a block finds what the first pass found.
            recompute_with_cache(decoder)

    def _before(self, _decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        inputs = {**dict(zip(self.words, args, strict=False)), **kwargs}
        self.added = 0
        if not self.active():
            return (), inputs
        if inputs.get("cu_seq_lens_q") is not None:
            raise ValueError("virtual tokens need a row for each document; a padding-free row holds several")
        cache = inputs.get(self.cache_word) if self.cache_word else None
        self._make_room(inputs)
        if cache is None or cache.get_seq_length() == 0:
            if self.prefix is None:
                self._give_prompt(inputs)
            else:
                self._give_prefix(inputs, cache, self.prefix)
        return (), inputs

    def _after(self, _decoder: nn.Module, _args: Any, output: Any) -> Any:
        if self.added and self.strips:
            output.last_hidden_state = output.last_hidden_state[:, self.added :]
        self.added = 0
        return output

    def _make_room(self, inputs: dict[str, Any]) -> None:
        """Positions and mask of what follows the virtual tokens."""
        mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
        if mask is not None:
            if mask.dim() != 2:
                raise ValueError("virtual tokens need a mask of two dimensions; switch static caches off")
            inputs["attention_mask"] = torch.cat([mask.new_ones(mask.shape[0], self.tokens), mask], dim=1)
        if positions is not None:
            inputs["position_ids"] = positions + self.tokens

    def _give_prompt(self, inputs: dict[str, Any]) -> None:
        ids = inputs.pop("input_ids", None)
        embedded = self.embeddings(ids) if ids is not None else inputs["inputs_embeds"]
        tokens = torch.arange(self.tokens, device=embedded.device)[None]
        prompt = self.encoder(tokens).to(embedded.dtype).expand(embedded.shape[0], -1, -1)
        inputs["inputs_embeds"] = torch.cat([prompt, embedded], dim=1)
        if (positions := inputs.get("position_ids")) is not None:
            inputs["position_ids"] = torch.cat([tokens.expand(positions.shape[0], -1), positions], dim=1)
        self.added = self.tokens

    def _give_prefix(self, inputs: dict[str, Any], cache: Any, shape: PrefixShape) -> None:
        given = inputs.get("input_ids")
        given = given if given is not None else inputs["inputs_embeds"]
        flat = self.encoder(torch.arange(self.tokens, device=given.device)[None])
        # [layers, 2, B, heads, tokens, width of a head]
        by_layer = flat.view(1, self.tokens, shape.layers, 2, shape.heads, -1).permute(2, 3, 0, 4, 1, 5)
        by_layer = by_layer.expand(-1, -1, given.shape[0], -1, -1, -1)
        assert self.cache_word is not None, "checked when the method was applied"
        if cache is None and not inputs.get("use_cache"):
            inputs[self.cache_word] = prefix_cache(by_layer)
            return
        if cache is None:
            from transformers import DynamicCache

            cache = inputs[self.cache_word] = DynamicCache()
        for layer, (keys, values) in enumerate(by_layer):
            cache.update(keys, values, layer)


def cache_word(decoder: nn.Module) -> str | None:
    """What the decoder's forward calls keys and values from outside; transformers renamed it."""
    words = inspect.signature(decoder.forward).parameters
    return next((word for word in ("cache", "past_key_values") if word in words), None)


def prefix_cache(by_layer: Tensor) -> Any:
    """A transformers Cache of a prefix `[layers, 2 (keys, values), B, heads, P, width]` that only reads.

    A cache as transformers makes it grows with every call, so that a block that is recomputed would meet its own keys.
    """
    from transformers import Cache, DynamicLayer

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

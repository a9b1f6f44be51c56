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
    """How the encoder's output for a prefix, `[tokens, num_layers * 2 * num_heads * head_dim]`, is cut into keys and values."""

    num_layers: int
    num_heads: int


class Prepend:
    """Hooks on one decoder that prepend virtual tokens to its inputs and strip their rows from its output.

    `encoder`: makes the virtual tokens from their numbers 0 to P - 1. `prefix`: how the encoder's output is cut into keys and
    values; None if the encoder gives embeddings. `is_active()` is asked at the beginning of each forward pass: if it is false,
    the pass is left as it is.
    """

    def __init__(
        self,
        decoder: nn.Module,
        encoder: nn.Module,
        embeddings: nn.Module,
        num_virtual_tokens: int,
        prefix: PrefixShape | None,
        is_active: Callable[[], bool] = lambda: True,
    ) -> None:
        """Put the hooks on `decoder`. `embeddings`: the decoder's own, of its input ids."""
        self.encoder = encoder
        self.embeddings = embeddings
        self.num_virtual_tokens = num_virtual_tokens
        self.prefix = prefix
        self.is_active = is_active
        self.argument_names = list(inspect.signature(decoder.forward).parameters)
        self.cache_argument = cache_argument(decoder)
        self.strips_rows = is_causal(decoder)
        """Not for an encoder for classification (BERT's kind): its head reads the first row, a virtual token's, as under peft."""
        self.num_added_positions = 0
        """Positions of the hidden states that the current forward pass has before the caller's, which `_strip_rows` removes; 0
        between passes."""
        decoder.register_forward_pre_hook(self._prepend_tokens, with_kwargs=True)
        decoder.register_forward_hook(self._strip_rows)
        if prefix is not None:
            # The cache of a prefix only reads, so that recomputing a block finds what the first pass found.
            recompute_with_cache(decoder)

    def _prepend_tokens(
        self, _decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        """The hook before the decoder's forward pass: puts the virtual tokens before its inputs.

        Returns ((), all arguments by name).
        - inactive, so that the base alone computes (a reference): the inputs as they are.
        - the KV cache holds tokens already (generation after its first pass): only the mask and the positions change, since the
          cache has the virtual tokens.
        - else: the virtual tokens stand before the inputs, as embeddings or as keys and values.

        Raises ValueError for a row of several documents, each of which would need virtual tokens of its own.
        """
        inputs = {**dict(zip(self.argument_names, args, strict=False)), **kwargs}
        self.num_added_positions = 0
        if not self.is_active():
            return (), inputs
        if inputs.get("cu_seq_lens_q") is not None:
            raise ValueError("virtual tokens need a row for each document; a padding-free row holds several")
        cache = None
        if self.cache_argument:
            cache = inputs.get(self.cache_argument)
        self._extend_mask_and_positions(inputs)
        if cache is not None and cache.get_seq_length() > 0:
            return (), inputs  # generation: the cache has the virtual tokens since its first pass
        if self.prefix is None:
            self._prepend_prompt(inputs)
        else:
            self._prepend_prefix(inputs, cache, self.prefix)
        return (), inputs

    def _strip_rows(self, _decoder: nn.Module, _args: Any, output: Any) -> Any:
        """The hook behind the decoder: its output without the rows of the virtual tokens."""
        if self.num_added_positions and self.strips_rows:
            output.last_hidden_state = output.last_hidden_state[:, self.num_added_positions :]
        self.num_added_positions = 0
        return output

    def _extend_mask_and_positions(self, inputs: dict[str, Any]) -> None:
        """Let the attention mask cover the virtual tokens, and shift the positions of the caller's tokens behind them.

        Changes `inputs`. Raises ValueError for a mask that is not `[B, T]`.
        """
        mask = inputs.get("attention_mask")
        positions = inputs.get("position_ids")
        if mask is not None:
            if mask.dim() != 2:
                raise ValueError("virtual tokens need a mask of two dimensions; switch static caches off")
            inputs["attention_mask"] = torch.cat([mask.new_ones(mask.shape[0], self.num_virtual_tokens), mask], dim=1)
        if positions is not None:
            inputs["position_ids"] = positions + self.num_virtual_tokens

    def _prepend_prompt(self, inputs: dict[str, Any]) -> None:
        """Replace the input ids by embeddings `[B, P + T, H]` that begin with those of the P virtual tokens, in `inputs`.

        Sets `num_added_positions`, by which the rows of the virtual tokens are removed from the decoder's output.
        """
        ids = inputs.pop("input_ids", None)
        embedded = self.embeddings(ids) if ids is not None else inputs["inputs_embeds"]
        batch_size = embedded.shape[0]
        token_numbers = torch.arange(self.num_virtual_tokens, device=embedded.device)[None]
        prompt = self.encoder(token_numbers).to(embedded.dtype).expand(batch_size, -1, -1)
        inputs["inputs_embeds"] = torch.cat([prompt, embedded], dim=1)
        positions = inputs.get("position_ids")
        if positions is not None:  # shifted already; the virtual tokens have the positions before them
            inputs["position_ids"] = torch.cat([token_numbers.expand(positions.shape[0], -1), positions], dim=1)
        self.num_added_positions = self.num_virtual_tokens

    def _prepend_prefix(self, inputs: dict[str, Any], cache: Any, prefix_shape: PrefixShape) -> None:
        """Let every layer attend to the keys and values of the virtual tokens, through the decoder's KV cache:

        - no cache, and `use_cache` is off (training): a read-only one, so that a recomputed block does not find its own keys in
          it.
        - no cache, but `use_cache` (generation): a new one, to which the decoder appends.
        - the caller gives a cache: the prefix is put into it. It must be empty, as in the first pass of a generation.

        `inputs`: keyword arguments of the decoder, changed in place. `cache`: the caller's, or None. `prefix_shape`: layers
        and heads of the prefix, which the encoder makes as one row for each virtual token.
        """
        keys_and_values = self._encode_prefix(inputs, prefix_shape)
        assert self.cache_argument is not None, "checked when the method was applied"
        if cache is None and not inputs.get("use_cache"):
            inputs[self.cache_argument] = read_only_cache(keys_and_values)
            return
        if cache is None:
            from transformers import DynamicCache

            cache = inputs[self.cache_argument] = DynamicCache()
        for layer_index, (keys, values) in enumerate(keys_and_values):
            cache.update(keys, values, layer_index)

    def _encode_prefix(self, inputs: dict[str, Any], prefix_shape: PrefixShape) -> Tensor:
        """Make the keys and values of the P virtual tokens, `[num_layers, 2, B, num_heads, P, head_dim]`; keys come first.

        `inputs`: the decoder's, for the size of the batch.
        """
        input_tensor = inputs.get("input_ids")
        if input_tensor is None:
            input_tensor = inputs["inputs_embeds"]
        batch_size = input_tensor.shape[0]
        encoded = self.encoder(torch.arange(self.num_virtual_tokens, device=input_tensor.device)[None])
        by_token = encoded.view(1, self.num_virtual_tokens, prefix_shape.num_layers, 2, prefix_shape.num_heads, -1)
        by_layer = by_token.permute(2, 3, 0, 4, 1, 5)
        return by_layer.expand(-1, -1, batch_size, -1, -1, -1)  # views: every row of the batch has the same prefix


def cache_argument(decoder: nn.Module) -> str | None:
    """Name of the decoder's argument for keys and values from outside, which transformers renamed; None without one."""
    parameters = inspect.signature(decoder.forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in parameters), None)


def read_only_cache(keys_and_values: Tensor) -> Any:
    """Make a transformers Cache that holds the keys and values of P virtual tokens, and keeps no others.

    Its `update` returns them before new ones. `keys_and_values`: `[num_layers, 2, B, num_heads, P, head_dim]`, keys first. A
    cache as transformers makes it grows with every call, so that a block that is recomputed would meet its own keys.
    """
    from transformers import Cache, DynamicLayer

    class Prefix(DynamicLayer):
        """One layer of the cache: returns new keys and values behind the prefix's, and keeps none of them."""

        def __init__(self, keys: Tensor, values: Tensor) -> None:
            super().__init__()
            self.keys = keys
            self.values = values
            self.is_initialized = True

        def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
            """Keys and values `[B, heads, P + T, width]`."""
            keys = self.keys.to(key_states.dtype)  # type: ignore[union-attr]
            values = self.values.to(value_states.dtype)  # type: ignore[union-attr]
            return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)

    return Cache(layers=[Prefix(keys, values) for keys, values in keys_and_values])

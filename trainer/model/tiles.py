"""Tiles of the MLP: the MLP of each block takes a few tokens at a time, and recomputes them tile by tile.

An MLP widens each token three to four times, twice or three times over. In a row of a million tokens this is the largest thing
that a block holds. No token of an MLP knows another one, so the row can be cut into tiles: each is a checkpoint of its own, and
only one is there at a time. Sums over tokens (gradients of weights) are added up in another order, nothing else changes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from strategies.base import plan_of
from strategies.errors import ConfigError
from trainer.model.architecture import set_dropout, text_model_config, transformers_class
from trainer.model.compat import without_kernel_packages
from trainer.model.config import ModelKind
from trainer.model.shrink import SMALL_VOCABULARY_SIZE, small_copies
from trainer.tuning.compat.transformers import block_class_names

MLP_NAMES = ("mlp", "feed_forward")
"""Names under which a block has its MLP."""
MAX_TILE_DIFFERENCE = 1e-6
"""Largest difference between a pass with tiles and one without, relative to the largest output."""
PROOF_TOKENS = 23
PROOF_TILE = 5
"""Tokens of a row, and of a tile, with which tiles are proven: the last tile is shorter."""

_refusal_by_architecture: dict[str, str | None] = {}
"""Why an architecture computes something else with tiles; None if it does not. A plan asks for each of its simulations."""


def tile_mlps(
    step_module: nn.Module, hf_config: Any, meta_model: nn.Module, kind: ModelKind, tile_tokens: int | None
) -> None:
    """Let the MLPs of a step module take `tile_tokens` tokens at a time, to save memory in long rows. Call it before sharding.

    None leaves them as they are. `hf_config`: transformers' configuration. `meta_model`: its model on meta, as it was built.
    Raises ConfigError for a model without MLPs that could be tiled, or of which a small copy computes something else with
    tiles.
    """
    if tile_tokens is None:
        return
    classes = block_class_names(meta_model)
    reason = _untileable_reason(meta_model, classes) or _cached_tile_refusal(hf_config, meta_model, kind)
    if reason is not None:
        raise ConfigError(f"strategy.mlp_tokens={tile_tokens}: {reason}; set strategy.mlp_tokens=null")
    # A teacher of the same architecture is tiled too: it makes no gradients, but widens its tokens likewise.
    mlps = [mlp for block in _blocks(step_module, classes) if (mlp := _mlp_of(block)) is not None]
    for mlp in mlps:
        mlp.forward = partial(_in_tiles, mlp.forward, tile_tokens)  # type: ignore[method-assign]
    # ZeRO-3 gathers where a module is called. If the MLP is called as one, its tiles find its weights gathered.
    plan = plan_of(step_module)
    plan.gathered_as_one |= {type(mlp).__name__ for mlp in mlps}


def _in_tiles(compute: Callable[[Tensor], Tensor], tile_tokens: int, hidden: Tensor) -> Tensor:
    """An MLP's forward pass in tiles: `compute(hidden)` of `hidden [rows, length, width]`, about `tile_tokens` tokens at a time.

    Rows are cut at the same positions, at least one position a tile. Each tile is recomputed in the backward pass, so that the
    widened states of one tile alone are there at a time. No collective.
    """
    positions = max(1, tile_tokens // hidden.shape[0])  # of each row
    if not torch.is_grad_enabled():
        return torch.cat([compute(tile) for tile in hidden.split(positions, dim=1)], dim=1)
    # The last tile needs its checkpoint as well, even if it is the only one: ranks may have different numbers of tiles.
    tiles = [checkpoint(compute, tile, use_reentrant=False) for tile in hidden.split(positions, dim=1)]
    return torch.cat(tiles, dim=1)


def _blocks(model: nn.Module, classes: set[str]) -> Iterator[nn.Module]:
    """The repeated blocks of a model, by the names of their classes."""
    for module in model.modules():
        if type(module).__name__ in classes:
            yield module


def _mlp_of(block: nn.Module) -> nn.Module | None:
    """The child of a block that is its MLP, by one of `MLP_NAMES`; None if the block has no such child."""
    children = dict(block.named_children())
    return next((children[name] for name in MLP_NAMES if name in children), None)


def _untileable_reason(model: nn.Module, block_classes: set[str]) -> str | None:
    """Why the MLPs of a model cannot take a few tokens at a time (a tile), by the names of its modules; None if they may.

    Whether they then compute the same is proven on a small copy. `block_classes`: names of the classes of its repeated blocks.
    """
    blocks = list(_blocks(model, block_classes))
    if not blocks:
        return "this architecture names no repeated blocks, in which MLPs could be found"
    for block in blocks:
        name = type(block).__name__
        if any("experts" in part for part, _ in block.named_modules()):
            return (
                f"{name} is a mixture of experts. Tokens choose their experts, and the rows of an expert are no tile of the "
                "row of tokens; only dense MLPs are tiled"
            )
        if _mlp_of(block) is None:
            return f"{name} has no MLP by the name of {' or '.join(MLP_NAMES)}"
    return None


def _cached_tile_refusal(hf_config: Any, meta_model: nn.Module, kind: ModelKind) -> str | None:
    """Why a small copy of the model does not compute the same with tiles; None if it does. Tested once in a process."""
    key = json.dumps([kind, hf_config.to_dict()], sort_keys=True, default=str)
    if key not in _refusal_by_architecture:
        _refusal_by_architecture[key] = _difference_of_small_copy(hf_config, meta_model, kind)
    return _refusal_by_architecture[key]


def _difference_of_small_copy(hf_config: Any, meta_model: nn.Module, kind: ModelKind) -> str | None:
    """Prove on a small random copy of the model that its MLPs compute the same if they take a few tokens at a time (tiles).

    Returns None if so; else a sentence, also if the copy fails. Leaves the random state as it was.
    """
    with torch.random.fork_rng(devices=[]), without_kernel_packages():
        torch.default_generator.manual_seed(0)  # of the CPU alone
        try:
            return _difference_in_tiles(_small_model(hf_config, meta_model, kind))
        except Exception as error:  # noqa: BLE001 - an architecture may fail in any way; then tiles are not proven
            message = (str(error).strip() or "no message").splitlines()[0]
            return f"tiles cannot be proven, since a small copy of the model fails ({type(error).__name__}: {message[:120]})"


def _small_model(hf_config: Any, meta_model: nn.Module, kind: ModelKind) -> Any:
    """The first small copy that can be built, with random weights in float64, so that rounding hides no difference.

    Raises the error of the first one if none can.
    """
    first_error: Exception | None = None
    for small_config in small_copies(hf_config, meta_model):
        set_dropout(small_config, 0.0)
        try:
            model = transformers_class(kind, hf_config).from_config(
                small_config, attn_implementation="eager", dtype=torch.float64
            )
            return model.eval()
        except Exception as error:  # noqa: BLE001 - an architecture may fail in any way
            first_error = first_error or error
    assert first_error is not None  # `small_copies` raises if it has none
    raise first_error


@torch.no_grad()
def _difference_in_tiles(small_model: Any) -> str | None:
    """How the outputs of a small model change when its MLPs take a few tokens at a time, as a sentence; None if they do not.

    Replaces the forward passes of the model's MLPs.
    """
    vocabulary = min(text_model_config(small_model.config).vocab_size, SMALL_VOCABULARY_SIZE)
    # One row of fixed tokens that differ, `[1, PROOF_TOKENS]`.
    ids = torch.arange(PROOF_TOKENS)[None] * 7 % vocabulary
    untiled_output = small_model(input_ids=ids, use_cache=False)[0]
    num_tiled = 0
    for block in _blocks(small_model, block_class_names(small_model)):
        mlp = _mlp_of(block)
        if mlp is not None:
            mlp.forward = partial(_in_tiles, mlp.forward, PROOF_TILE)  # type: ignore[method-assign]
            num_tiled += 1
    if num_tiled == 0:
        return "its small copy has no MLP that could be tiled"
    tiled_output = small_model(input_ids=ids, use_cache=False)[0]
    difference = float((tiled_output - untiled_output).abs().max() / untiled_output.abs().max())
    if difference <= MAX_TILE_DIFFERENCE:  # a NaN is no agreement
        return None
    return f"its MLP looks at more than one token: with tiles, outputs of a small copy change by {difference:.1e}"

"""Observes routers and experts in a forward pass: the tokens of each expert, and the routers' logits.

Nothing here changes what a model computes. Outside `recording_routing` nothing is recorded, so that blocks which are
recomputed in a backward pass count once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from trainer.model.compat import output_recorders
from trainer.tuning.expert_parts import expert_modules_by_name

BALANCING_BIAS_NAMES = ("e_score_correction_bias", "expert_bias", "balancing_biases")
"""Names of the biases that a model's pre-training moved to balance experts, and that no gradient reaches."""
ADDED_LOSS = "added_loss"
"""Term of a forward pass: what the model adds to the objective's loss, already a part of the whole step's mean."""
EXPERT_TOKENS = "expert_tokens"
"""Term of a forward pass: how many tokens chose each expert, int64 `[layers, experts]`."""


@dataclass(slots=True)
class RoutingRecord:
    """What is recorded of the routers of a mixture of experts in one forward pass: for balance losses and expert load."""

    mask: Tensor | None
    """`[S, T]`, 1 at tokens and 0 at padding; None where every position is a token."""
    tokens: Tensor | None = None
    """int64 `[layers, experts]`: how many tokens chose each expert; None: not to be counted."""
    logits: list[Tensor] = field(default_factory=list)
    """Of each router that recorded them, in the order of their calls, `[positions, experts]`."""
    without_gradients: bool = False
    """Whether passes without gradients are recorded too; otherwise such a pass is a reference model's, and is left out."""
    hidden: list[Tensor] = field(default_factory=list)
    """What the head makes logits of, `[S, T, H]`, of each pass through a decoder that notes it."""
    _token_masks: dict[int, Tensor] = field(default_factory=dict)

    @property
    def is_recording(self) -> bool:
        """Whether what is computed now belongs to the recorded pass."""
        return self.without_gradients or torch.is_grad_enabled()

    def token_mask(self, num_positions: int) -> Tensor | None:
        """bool `[num_positions]`: which positions of all rows, flattened, are tokens of documents and not padding; None: all.

        `num_positions`: as many as a layer's routers see. It may exceed those of the batch, since prompt tuning puts virtual
        tokens before each row; they count as padding.
        """
        if self.mask is None:
            return None
        if num_positions not in self._token_masks:  # every layer asks for the same
            num_rows, row_length = self.mask.shape
            num_virtual_tokens = num_positions // num_rows - row_length
            with_virtual_tokens = nn.functional.pad(self.mask.bool(), (num_virtual_tokens, 0), value=False)
            self._token_masks[num_positions] = with_virtual_tokens.view(-1)
        return self._token_masks[num_positions]


class _Recording:
    """The pass that is recorded now, and the function that notes tokens of experts in it (`_count_tokens`, never compiled).

    Compiled graphs must not hold the record: they would keep it.
    """

    record: RoutingRecord | None = None
    note_expert_tokens: Callable[[Any, Tensor], None]


@contextmanager
def recording_routing(record: RoutingRecord) -> Iterator[RoutingRecord]:
    """Note in `record` what routers and experts do while entered."""
    outer_record = _Recording.record
    _Recording.record = record
    try:
        yield record
    finally:
        _Recording.record = outer_record


def count_expert_load(module: Any, expert_indices: Tensor) -> None:
    """Count how many tokens chose each expert of `module`, if the forward pass is recorded. Called in each layer of experts.

    `expert_indices`: `[positions, k]`, the experts that each position chose. Waits for no device.
    """
    # Only whether there is a row is asked here: reading the row itself would compile a block anew for each layer.
    if hasattr(module, "row_in_routing_record"):
        # This is never compiled: a compiled graph would keep the record alive.
        _Recording.note_expert_tokens(module, expert_indices)


def _count_tokens(module: Any, expert_indices: Tensor) -> None:
    """Add to the record of the pass, in `tokens [layers, experts]`, how many tokens chose each expert of a layer.

    Does nothing if no pass is recorded. `module`: the layer's experts, which know their row in `tokens`. `expert_indices`:
    `[positions, k]`, the experts that each position chose. Padding does not count. Nothing waits for the device.
    """
    record = _Recording.record
    if record is None or record.tokens is None or not record.is_recording:
        return
    num_experts = record.tokens.shape[1]
    flat_indices = expert_indices.reshape(-1).long()
    counts = (flat_indices < num_experts).long()  # beyond them lie experts that compute nothing, where a model has such
    is_token = record.token_mask(len(expert_indices))
    if is_token is not None:
        chosen_per_token = expert_indices.shape[-1]
        counts = counts * is_token.repeat_interleave(chosen_per_token, output_size=len(flat_indices))
    # Indices are clamped, since scatter takes none beyond the row; their count is 0.
    record.tokens[module.row_in_routing_record].scatter_add_(0, flat_indices.clamp(max=num_experts - 1), counts)


def enable_token_counts(model: nn.Module) -> tuple[int, ...]:
    """Prepare a model for counts of tokens by expert.

    Each module of experts then adds to the record while a forward pass is recorded. Sets the module's attribute
    `row_in_routing_record`: the index of its row in `RoutingRecord.tokens`. Returns how many experts each module has, as in (8,
    8); empty for a model without experts.
    """
    modules: list[Any] = list(expert_modules_by_name(model).values())
    if modules:
        # Set here and not at import: `torch.compiler.disable` imports what takes a second.
        _Recording.note_expert_tokens = torch.compiler.disable(_count_tokens)
    for row, module in enumerate(modules):
        module.row_in_routing_record = row
    return tuple(int(module.num_experts) for module in modules)


def recorded_routers(model: nn.Module) -> dict[str, int]:
    """Find the routers of a model, as transformers' own declarations for `output_router_logits` name them.

    Returns for each router's name the index of the logits in its output: {"model.layers.0.mlp.gate": 0}.
    """
    output_index_by_router: dict[str, int] = {}
    _add_routers_below(model, "", [], output_index_by_router)
    return output_index_by_router


def _add_routers_below(
    module: nn.Module, name: str, inherited_recorders: list[Any], output_index_by_router: dict[str, int]
) -> None:
    """Add the routers among `module`, called `name` in the model, and the modules in it to `output_index_by_router`.

    transformers' classes of models declare recorders (`OutputRecorder`), which say what modules are routers: by class or by the
    end of the name, perhaps only in a layer of some name. A module that is no model by itself has the recorders of its parent
    (`inherited_recorders`).
    """
    own_recorders = output_recorders(module, "router_logits")
    recorders = inherited_recorders if own_recorders is None else own_recorders
    for recorder in recorders:
        matches_class = recorder.target_class is not None and isinstance(module, recorder.target_class)
        matches_name = recorder.class_name is not None and f".{name}".endswith(recorder.class_name)
        is_in_named_layer = recorder.layer_name is None or f".{recorder.layer_name.strip('.')}." in f".{name}."
        if (matches_class or matches_name) and is_in_named_layer:
            output_index_by_router[name] = recorder.index
    for key, child in module.named_children():
        _add_routers_below(child, f"{name}.{key}".lstrip("."), recorders, output_index_by_router)


def hook_router_logits(root: nn.Module, output_index_by_router: dict[str, int]) -> None:
    """Let each router note its logits in the record of the pass, with what adapters add to them, by a forward hook.

    `output_index_by_router`: names of modules of `root`, with the index of the logits in their output.
    """
    for name, index in output_index_by_router.items():
        root.get_submodule(name).register_forward_hook(torch.compiler.disable(partial(_note_logits, index)))


def _note_logits(index: int, _router: nn.Module, _args: Any, output: Any) -> None:
    """The forward hook of a router: appends element `index` of its output, the logits, to the record of the pass as
    `[positions, experts]`.
    """
    record = _Recording.record
    if record is None or not record.is_recording:
        return
    logits = output[index] if isinstance(output, tuple) else output
    if logits is not None:
        record.logits.append(logits.reshape(-1, logits.shape[-1]))


def hook_decoder_output(decoder: nn.Module) -> None:
    """Add a hook to `decoder`, so that it notes in the recorded pass the hidden states that it gives to the head."""
    decoder.register_forward_hook(torch.compiler.disable(_note_hidden))


def _note_hidden(_decoder: nn.Module, _args: Any, output: Any) -> None:
    """A forward hook: notes the decoder's hidden states in the open record."""
    record = _Recording.record
    if record is not None and record.is_recording:
        record.hidden.append(output.last_hidden_state)


def balancing_biases(model: nn.Module) -> list[str]:
    """Names of the biases by which the model's pre-training balanced its experts."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return [name for name, _ in tensors if name.rsplit(".", 1)[-1] in BALANCING_BIAS_NAMES]

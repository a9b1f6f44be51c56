"""LoRA on linear layers in one autograd function: the update goes into the base output, the input is kept once.

peft computes `base(x) + B(A(x)) * scaling` as separate modules: two more passes over the output forward, one more over the
gradient of the input backward, and casts of the input under autocast. Here both are accumulated by the matrix products
themselves, and layers that are called one after the other on the same input (q, k and v; gate and up) share one product
with their A's, and one sum of its gradients. Parameters, names and files stay peft's; so do all layers that do more than
this (dropout, DoRA, quantised or transposed bases, several adapters).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from strategies.compat.dispatch import RESHAPED_IN_PLACE

ADAPTER = "default"
SHARED_INPUT_NAMES = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("gate_proj", "up_proj"))
"""Names of layers that one parent module calls on the same input."""


class _LowRankLinears(torch.autograd.Function):
    """`x @ W.T + bias + scaling * (x @ A.T) @ B.T` for n frozen W over one x; gradients of x, A and B alone.

    x `[..., in]`, W `[out, in]`, A `[r, in]`, B `[out, r]`, all of one data type but A and B, which are cast. `tensors`
    are n W, n biases (or None), n A, n B.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scalings: Sequence[float], in_place: bool, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        """The outputs `[..., out]` of n layers for one input `x [..., in]`: base product and LoRA update of each.

        `in_place`: the low-rank product is added into the base layer's output, without another tensor. `tensors`: n W, n biases
        (or None), n A (`down`) and n B (`up`). Saves for `backward` x, x A^T, and the matrices.
        """
        weights, biases, downs, ups = _split_in_four_lists(tensors)
        x_rows = x.reshape(-1, x.shape[-1])
        ctx.lora_ranks = [down.shape[0] for down in downs]
        # One product with the A's of all layers, [rows, sum of LoRA ranks]; each layer takes its columns.
        projected = x_rows @ _concatenate(downs).to(x.dtype).T
        projected_by_layer = projected.split(ctx.lora_ranks, dim=1)
        outputs = []
        for weight, bias, up, layer_projected, scaling in zip(
            weights, biases, ups, projected_by_layer, scalings, strict=True
        ):
            output = x_rows @ weight.T if bias is None else torch.addmm(bias, x_rows, weight.T)
            up_transposed = up.to(x.dtype).T
            if in_place:
                output.addmm_(layer_projected, up_transposed, alpha=scaling)
            else:
                output = torch.addmm(output, layer_projected, up_transposed, alpha=scaling)
            # Not a view: the model may change an output in place, and autograd refuses that for views of several outputs.
            outputs.append(RESHAPED_IN_PLACE(output, [*x.shape[:-1], output.shape[-1]]))
        ctx.save_for_backward(x_rows, projected, *weights, *downs, *ups)
        ctx.scalings = scalings
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:  # type: ignore[override]
        """The gradients of x, and of A and B of each layer, as far as they are needed; the base weights are frozen.

        A layer's output is x W^T + (x A^T) B^T * scaling. `projected [rows, sum of LoRA ranks]` is x A^T of all layers side by
        side. `grads`: one for each layer's output, `[..., out]`. In the code A is `down` and B is `up`. The result follows the
        arguments of `forward`.
        """
        x_rows, projected, *layer_tensors = ctx.saved_tensors
        n = len(grads)  # layers
        scalings = ctx.scalings
        weights = layer_tensors[:n]
        downs = layer_tensors[n : 2 * n]
        ups = layer_tensors[2 * n :]
        # `needs_input_grad` follows the arguments of forward: x first, n A and n B at the end.
        x_needs_grad = ctx.needs_input_grad[0]
        downs_need_grad = ctx.needs_input_grad[-2 * n : -n]
        ups_need_grad = ctx.needs_input_grad[-n:]

        row_grads = [grad.reshape(-1, grad.shape[-1]) for grad in grads]  # [rows, out] each
        grads_projected = []
        for grad, up, scaling in zip(row_grads, ups, scalings, strict=True):
            # dL/d(x A^T) of this layer, [rows, its LoRA rank].
            grads_projected.append((grad @ up.to(grad.dtype)).mul_(scaling))
        grad_projected = _concatenate(grads_projected, dim=1)  # [rows, sum of LoRA ranks]

        grad_x = None
        if x_needs_grad:
            grad_x = grad_projected @ _concatenate(downs).to(grad_projected.dtype)
            for grad, weight in zip(row_grads, weights, strict=True):
                grad_x.addmm_(grad, weight)
            grad_x = grad_x.view(*grads[0].shape[:-1], x_rows.shape[-1])

        grad_downs: Sequence[Tensor | None] = [None] * n
        if any(downs_need_grad):  # one product for all A's
            grad_downs = (grad_projected.T @ x_rows).to(downs[0].dtype).split(ctx.lora_ranks)

        grad_ups: list[Tensor | None] = [None] * n
        projected_by_layer = projected.split(ctx.lora_ranks, dim=1)
        for i, needs_grad in enumerate(ups_need_grad):
            if needs_grad:
                grad_up = (row_grads[i].T @ projected_by_layer[i]).mul_(scalings[i])
                grad_ups[i] = grad_up.to(ups[0].dtype)
        # The gradients of x, scalings, in_place, n weights, n biases, n A and n B.
        return grad_x, None, None, *[None] * (2 * n), *grad_downs, *grad_ups


def _split_in_four_lists(tensors: Sequence[Any]) -> list[Sequence[Any]]:
    """A sequence cut into four of equal length: of eight tensors, the first two, the next two and so on."""
    n = len(tensors) // 4
    return [tensors[start : start + n] for start in range(0, 4 * n, n)]


def _concatenate(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    """`torch.cat`, but a single tensor is returned itself: `torch.cat` would copy it."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim=dim)


def _lora_outputs(layers: Sequence[Any], x: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The outputs of several of peft's LoRA layers that read the same input x (such as q, k and v), computed in `dtype`.

    One autograd function computes them together, so that the products with all A matrices become one.
    """
    # Of each layer: base weight and bias, A (down), B (up) and the factor of their product.
    weights = []
    biases = []
    downs = []
    ups = []
    scalings = []
    for layer in layers:
        base = layer.get_base_layer()
        weights.append(base.weight.to(dtype))
        biases.append(None if base.bias is None else base.bias.to(dtype))
        downs.append(layer.lora_A[ADAPTER].weight)
        ups.append(layer.lora_B[ADAPTER].weight)
        scalings.append(layer.scaling[ADAPTER])
    # All layers are of one block, and checkpointing sets this for a block as a whole.
    in_place = layers[0].overwrites_output
    return _LowRankLinears.apply(x.to(dtype), scalings, in_place, *weights, *biases, *downs, *ups)  # type: ignore[no-any-return]


class _SharedInput:
    """Layers that read the same input: the first one called computes the outputs of all, and the others take theirs.

    Waiting outputs belong to one input tensor, by identity. A layer that is called on another tensor computes anew, so a
    model that does not share its inputs after all is slower, not wrong.
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        self.layers = layers
        self._input: Tensor | None = None
        """The input that `_pending_outputs` belong to."""
        self._pending_outputs: dict[int, Tensor] = {}
        """Outputs that were computed and not asked for yet, by the id of their layer."""

    def output_of(self, layer: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The output for x of `layer`, one of the layers that share their input, computed in `dtype`.

        The first of them to be called computes the outputs of all, and keeps those of the others until they are called. A block
        that is recomputed in the backward pass calls all of them again, with another tensor.
        """
        if self._input is not x or id(layer) not in self._pending_outputs:
            outputs = _lora_outputs(self.layers, x, dtype)
            self._input = x
            self._pending_outputs = {id(member): output for member, output in zip(self.layers, outputs, strict=True)}
        output = self._pending_outputs.pop(id(layer))
        if not self._pending_outputs:  # do not keep the input alive
            self._input = None
        return output


@cache
def _fused_lora_class() -> type:
    """Make a subclass of peft's linear layer with another forward pass: once, at the first call, since peft is a heavy import."""
    from peft.tuners.lora import Linear

    class FusedLoraLinear(Linear):
        """As peft's layer, with the low-rank product accumulated into the base layer's output."""

        is_fusion_enabled = True
        """It uses its children's parameters itself; engines that gather parameters module by module switch this off."""
        overwrites_output = True
        """Whether the base output may be overwritten; selective checkpointing keeps it and switches this off."""
        shared_input: _SharedInput | None = None
        """The layers that share its input, where there are any."""

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            """The layer's output, base and low-rank product computed together. Cases, in order:

            - other arguments, adapters switched off, merged or of another name, or fusion off: peft's own forward pass.
            - base weight of another type than `x`, without autocast: peft's own forward pass, which casts.
            - no layer shares the input, or under compilation: this layer alone.
            - else: computed with the layers that share the input (query, key and value as a rule).
            """
            is_plain_call = self.is_fusion_enabled and not (args or kwargs or self.disable_adapters or self.merged)
            if not is_plain_call or self.active_adapters != [ADAPTER]:
                return super().forward(x, *args, **kwargs)
            dtype = x.dtype
            if not x.is_meta and torch.is_autocast_enabled(x.device.type):
                dtype = torch.get_autocast_dtype(x.device.type)
            elif self.get_base_layer().weight.dtype != dtype:  # mixed types without autocast: peft casts them
                return super().forward(x)
            # Under compilation the identity of an input is not known.
            if self.shared_input is None or torch.compiler.is_compiling():
                return _lora_outputs([self], x, dtype)[0]
            return self.shared_input.output_of(self, x, dtype)

    return FusedLoraLinear


def fuse_lora(model: nn.Module) -> int:
    """Let every plain LoRA layer compute its base and low-rank product together, in place, to save time and memory.

    "Plain" means that nothing but x W + B A x is computed: no dropout, no DoRA, no bias of its own. Returns how many layers
    that are; 0 for a model without adapters.
    """
    if not hasattr(model, "peft_config"):
        return 0
    from peft.tuners.lora import Linear

    layers = [module for module in model.modules() if type(module) is Linear and _is_plain_lora(module)]
    for layer in layers:  # only the forward pass changes: parameters, names and files stay peft's
        layer.__class__ = _fused_lora_class()
    is_encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if layers and not is_encoder_decoder:  # in cross-attention, keys and values read the encoder's output
        _share_inputs(model)
    return len(layers)


def _share_inputs(model: nn.Module) -> None:
    """Let LoRA layers that read the same input (q, k and v; gate and up) compute their products with it together.

    Sets `shared_input`. Layers of these names in one module are taken for such; if one reads another input after all, it
    computes alone.
    """
    for parent in model.modules():
        for names in SHARED_INPUT_NAMES:
            children: list[Any] = [getattr(parent, name, None) for name in names]
            layers: list[Any] = [child for child in children if isinstance(child, _fused_lora_class())]
            if len(layers) > 1 and len({layer.in_features for layer in layers}) == 1:
                shared_input = _SharedInput(layers)
                for layer in layers:
                    layer.shared_input = shared_input


def _is_plain_lora(layer: Any) -> bool:
    """Whether peft's layer computes `base(x) + B(A(x)) * scaling` and nothing else, on a frozen linear layer.

    Several adapters would be added up, and a `lora_variant` is peft's object for DoRA and the like.
    """
    base = layer.get_base_layer()
    return (
        type(base) is nn.Linear
        and not any(p.requires_grad for p in base.parameters())
        and list(layer.lora_A) == [ADAPTER]
        and isinstance(layer.lora_dropout[ADAPTER], nn.Identity)
        and not layer.lora_variant
        and not layer.lora_bias.get(ADAPTER, False)
        and layer.lora_A[ADAPTER].bias is None
    )

"""Numbers of the product against those of plain transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.models.stock import Stock, compute
from trainer.data.store.sequences import Sample

TOLERANCE = 1e-5


class Differs(AssertionError):
    """The product computes something else than plain transformers, or than `single`."""


def compare(what: str, found: float, right: float) -> None:
    """Raise `Differs` where two numbers are not the same to `TOLERANCE`."""
    if not abs(found - right) <= TOLERANCE * abs(right):
        raise Differs(f"{what} is {found:.8g}, should be {right:.8g}")


def compare_gradients(
    found: dict[str, torch.Tensor], values: dict[str, torch.Tensor], oracle: Stock, built: Any
) -> float:
    """The largest relative distance of a gradient from plain transformers' own; raises `Differs` where it is too large."""
    expected = expected_gradients(found, values, oracle, built)
    apart = distances(found, expected)
    if not expected:
        raise Differs("nothing is trained")
    worst = max(apart, key=lambda name: apart[name])
    if not apart[worst] <= TOLERANCE:
        raise Differs(
            f"gradient of {worst} is apart by {apart[worst]:.1e} of its norm {float(expected[worst].norm()):.1e}"
        )
    return apart[worst]


def distances(found: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> dict[str, float]:
    """How far each is from what it should be, relative to its norm; of the smallest, to a hundredth of the largest's size."""
    scale = max((float(g.norm()) / g.numel() ** 0.5 for g in right.values()), default=0.0)
    apart = {}
    for name, gradient in right.items():
        floor = 1e-2 * scale * gradient.numel() ** 0.5
        apart[name] = float((found[name] - gradient).norm()) / max(float(gradient.norm()), floor, 1e-30)
    return apart


def rounding(directory: Path, samples: list[Sample], oracle: Stock) -> float:
    """How far plain transformers' own gradients are from those in float64, the largest; 0: not known."""
    try:
        exact = compute(directory, samples, torch.float64)
    except RuntimeError:  # a model that mixes types
        return 0.0
    return max(distances(oracle.gradients, exact.gradients).values())


def expected_gradients(
    found: dict[str, torch.Tensor], values: dict[str, torch.Tensor], oracle: Stock, built: Any
) -> dict[str, torch.Tensor]:
    """What the trainable parameters' gradients must be, by their names here.

    Of an adapter that still adds nothing: B's is the weight's own times A, scaled, and A's is zero.
    """
    expected = {}
    for name in found:
        base = built.tuning.base_name(name)
        if ".lora_A." in name:
            expected[name] = torch.zeros_like(found[name])
        elif ".lora_B." in name:
            expected[name] = _of_adapter(name, values, oracle, built)
        else:
            first = _plain(base, oracle)
            places = [first, *oracle.shared.get(first, ())]
            expected[name] = torch.stack([oracle.gradients[place] for place in places]).sum(0)
    return expected


def _plain(name: str, oracle: Stock) -> str:
    """What the causal class calls a parameter of the whole model: without the part that it is."""
    for plain in (name, name.replace("language_model.", "", 1)):
        if plain in oracle.gradients:
            return plain
    raise Differs(f"{name} is trained, and the causal class of plain transformers has no such parameter")


def _of_adapter(name: str, values: dict[str, torch.Tensor], oracle: Stock, built: Any) -> torch.Tensor:
    place = name.split(".lora_B.")[0]
    layer = built.step_module.model.get_submodule(place)
    # peft wraps parameters that are no layer's `weight`, such as the experts of a block, one around the other.
    own = getattr(layer, "parameter_name", None)
    inner = place.replace(".base_layer", "") if own else f"{place}.base_layer"
    weight = oracle.gradients[_plain(built.tuning.base_name(f"{inner}.{own or 'weight'}"), oracle)]
    scaling, a = layer.scaling["default"], values[name.replace("lora_B", "lora_A")]
    if weight.dim() == 2:
        weight = weight.T if type(layer.get_base_layer()).__name__ == "Conv1D" else weight
        return scaling * weight @ a.T
    a = a.view(len(weight), -1, a.shape[-1])
    wide = "eoi" if layer._did_swap_in_out_features else "eio"
    return scaling * torch.einsum(f"{wide},eri->ore", weight, a).flatten(1)

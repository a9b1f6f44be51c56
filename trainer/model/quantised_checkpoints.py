"""Checkpoints that others stored in 4 or 8 bits: the library that reads one, and its layers as transformers loads them.

Such a model is evaluated as it is and never trained. Each rank holds it whole, and it computes in the types that it
is stored in.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from strategies.compat.modules import own_buffers, own_parameters
from strategies.errors import ConfigError
from strategies.extras import install_command
from trainer.model.architecture import auto_class
from trainer.model.config import ModelKind
from trainer.model.rules import read_config

EXTRAS = {"bitsandbytes": "qlora", "torchao": "torchao", "compressed-tensors": "compressed"}
"""The library that reads a model, as its config.json names it, and the extra that brings it."""


PACKED_ROWS = 32
PACKED_VALUES = 64


def stored_by(path: str | None) -> str | None:
    """The library that a model directory is stored in few bits by; None where it holds numbers, or by another one."""
    settings = (read_config(path) or {}).get("quantization_config")
    kit = settings.get("quant_method") if isinstance(settings, dict) else None
    return kit if kit in EXTRAS else None


def lacking(kit: str) -> str | None:
    """What to install where a library of `EXTRAS` is not there; None where it is."""
    if find_spec(kit.replace("-", "_")) is not None:
        return None
    return f"needs {kit}; {install_command(EXTRAS[kit])}"


def unmultiplied(model: nn.Module, device: torch.device) -> list[str]:
    """Matrices that bitsandbytes cannot multiply in 4 bits on `device`, with their sides; none on most.

    On a CPU with avx512_bf16 it packs a matrix before it multiplies: 32 rows together, with the scale of each 64 values of a row
    (0.50). Others end in an error about a shape amid the forward pass. The output layer stays in numbers.
    """
    from bitsandbytes.functional import has_avx512bf16

    if device.type != "cpu" or not has_avx512bf16():
        return []
    output_layer: Any = getattr(model, "get_output_embeddings", None)
    head = None if output_layer is None else output_layer()
    odd = []
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.Linear) or layer is head:
            continue
        if layer.out_features % PACKED_ROWS or layer.in_features % PACKED_VALUES:
            odd.append(f"{name} {layer.out_features}x{layer.in_features}")
    return odd


def refuse_unmultiplied(what: str, model: nn.Module, device: torch.device) -> None:
    """Raise ConfigError if bitsandbytes cannot multiply the model in 4 bits here. `what`: the setting, as bits=nf4."""
    if odd := unmultiplied(model, device):
        more = f" and {len(odd) - 3} more" if len(odd) > 3 else ""
        raise ConfigError(
            f"{what}: on a processor with avx512_bf16 bitsandbytes multiplies 4-bit matrices only if {PACKED_ROWS} divides their "
            f"rows and {PACKED_VALUES} their columns, and not {', '.join(odd[:3])}{more}; use a GPU or a processor without "
            "avx512_bf16, or store the model in another type, such as bits=int8"
        )


def _in_four_bits(settings: Any) -> bool:
    """Whether a model's configuration says that bitsandbytes stored it in 4 bits."""
    quantisation = getattr(settings, "quantization_config", None)
    if isinstance(quantisation, dict):
        return bool(quantisation.get("load_in_4bit"))
    return bool(getattr(quantisation, "load_in_4bit", False))


def take_layers(model: nn.Module, directory: str, settings: Any, device: torch.device) -> torch.dtype:
    """Put the values and layers of the model in few bits, as transformers loads it, into its architecture on meta.

    `settings`: transformers' configuration of the model. The type of what lies in no few bits. Raises ConfigError where the
    two do not fit, or the output layer itself lies in few bits, which losses are computed in.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    if _in_four_bits(settings):
        refuse_unmultiplied(f"model.path={directory}", model, device)
    loaded = auto_class(ModelKind.causal, settings).from_pretrained(
        directory, dtype="auto", device_map=str(device), local_files_only=True
    )
    with torch.no_grad():  # compressed-tensors unpacks its layers where the whole model is first called
        loaded(torch.zeros((1, 1), dtype=torch.long, device=device))
    head, there = loaded.get_output_embeddings(), dict(loaded.named_modules())
    if type(head) is not nn.Linear or type(head.weight) is not nn.Parameter:
        raise ConfigError(
            f"model.path={directory}: its output layer lies in few bits too, which losses cannot be computed in here; serve it, "
            "and give evaluation.server=http://..."
        )
    for name, mine in list(model.named_modules()):
        theirs = there.get(name)
        if (
            type(mine) is nn.Linear and theirs is not None
        ):  # whatever it is by now, it computes what the layer stands for
            owner, _, key = name.rpartition(".")
            setattr(model.get_submodule(owner), key, theirs)
        elif theirs is not None:
            parameters = own_parameters(mine)
            parameters.update({key: own_parameters(theirs).get(key) for key in parameters})
            buffers = own_buffers(mine)
            buffers.update({key: own_buffers(theirs).get(key, buffer) for key, buffer in buffers.items()})
    if left := [name for name, each in model.named_parameters() if each.is_meta]:
        raise ConfigError(f"model.path={directory}: transformers loads nothing for {', '.join(left[:3])}")
    return loaded.dtype  # type: ignore[no-any-return]

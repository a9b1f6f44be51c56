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
from trainer.model.architecture import transformers_class
from trainer.model.config import ModelKind
from trainer.model.rules import read_config

EXTRA_BY_LIBRARY = {"bitsandbytes": "qlora", "torchao": "torchao", "compressed-tensors": "compressed"}
"""The library that reads a model, as its config.json names it, and the extra that brings it."""


AVX512_ROWS_MULTIPLE = 32
AVX512_COLUMNS_MULTIPLE = 64
"""bitsandbytes packs a matrix for avx512_bf16 in blocks of so many rows and columns: the matrix must consist of whole blocks."""


def quantising_library(path: str | None) -> str | None:
    """The library of `EXTRA_BY_LIBRARY` that quantised a model directory; None if it is not quantised, or by another library."""
    settings = (read_config(path) or {}).get("quantization_config")
    library = settings.get("quant_method") if isinstance(settings, dict) else None
    return library if library in EXTRA_BY_LIBRARY else None


def missing_library(library: str) -> str | None:
    """What to install if a library of `EXTRA_BY_LIBRARY` is missing; None if it is there."""
    if find_spec(library.replace("-", "_")) is not None:
        return None
    return f"needs {library}; {install_command(EXTRA_BY_LIBRARY[library])}"


def unsupported_4bit_layers(model: nn.Module, device: torch.device) -> list[str]:
    """Matrices that bitsandbytes cannot multiply in 4 bits on `device`, with their sizes: ["fc1 100x64"]; [] on most devices.

    On a CPU with avx512_bf16 it (version 0.50) packs a matrix before it multiplies: 32 rows together, with the scale of each 64
    values of a row. Matrices of other sides end in an error about a shape amid the forward pass. The output layer is not
    quantised.
    """
    from bitsandbytes.functional import has_avx512bf16

    if device.type != "cpu" or not has_avx512bf16():
        return []
    output_layer: Any = getattr(model, "get_output_embeddings", None)
    head = None if output_layer is None else output_layer()
    unsupported = []
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.Linear) or layer is head:
            continue
        if layer.out_features % AVX512_ROWS_MULTIPLE or layer.in_features % AVX512_COLUMNS_MULTIPLE:
            unsupported.append(f"{name} {layer.out_features}x{layer.in_features}")
    return unsupported


def refuse_unsupported_4bit(setting: str, model: nn.Module, device: torch.device) -> None:
    """Raise ConfigError if bitsandbytes cannot multiply the model in 4 bits on this device.

    `setting`: what the user set, such as bits=nf4.
    """
    layers_with_sizes = unsupported_4bit_layers(model, device)  # such as "fc1 100x64"
    if not layers_with_sizes:
        return
    examples = ", ".join(layers_with_sizes[:3])
    if len(layers_with_sizes) > 3:
        examples += f" and {len(layers_with_sizes) - 3} more"
    raise ConfigError(
        f"{setting}: on a processor with avx512_bf16 bitsandbytes multiplies 4-bit matrices only if {AVX512_ROWS_MULTIPLE} "
        f"divides their rows and {AVX512_COLUMNS_MULTIPLE} their columns, and not {examples}; use a GPU or a processor "
        "without avx512_bf16, or store the model in another type, such as bits=int8"
    )


def _in_four_bits(hf_config: Any) -> bool:
    """Whether a model's configuration says that bitsandbytes stored it in 4 bits."""
    quantisation = getattr(hf_config, "quantization_config", None)
    if isinstance(quantisation, dict):
        return bool(quantisation.get("load_in_4bit"))
    return bool(getattr(quantisation, "load_in_4bit", False))


def replace_with_quantised(model: nn.Module, directory: str, hf_config: Any, device: torch.device) -> torch.dtype:
    """Load a model that is stored in few bits, and put its layers and values into `model`, its architecture on meta.

    For evaluations. Returns the type of the weights that are not in few bits. Raises ConfigError if the two do not fit, or if
    the output layer itself is in few bits: losses are computed in it.
    """
    if _in_four_bits(hf_config):
        refuse_unsupported_4bit(f"model.path={directory}", model, device)
    loaded = _load_in_few_bits(directory, hf_config, device)
    _put_layers_into(model, loaded)
    unfilled = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if unfilled:
        raise ConfigError(f"model.path={directory}: transformers loads nothing for {', '.join(unfilled[:3])}")
    return loaded.dtype  # type: ignore[no-any-return]


def _load_in_few_bits(directory: str, hf_config: Any, device: torch.device) -> Any:
    """Load the model in `directory` as transformers does. Raises ConfigError if its output layer lies in few bits too."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    loaded = transformers_class(ModelKind.causal, hf_config).from_pretrained(
        directory, dtype="auto", device_map=str(device), local_files_only=True
    )
    with torch.no_grad():  # compressed-tensors unpacks its layers where the whole model is first called
        loaded(torch.zeros((1, 1), dtype=torch.long, device=device))
    head = loaded.get_output_embeddings()
    if type(head) is not nn.Linear or type(head.weight) is not nn.Parameter:
        raise ConfigError(
            f"model.path={directory}: its output layer lies in few bits too, which losses cannot be computed in here; serve it, "
            "and give evaluation.server=http://..."
        )
    return loaded


def _put_layers_into(model: nn.Module, loaded: Any) -> None:
    """Replace the linear layers of `model` by those of `loaded`; its other modules take over parameters and buffers.

    A parameter that the same module of `loaded` does not have becomes None. A module that `loaded` does not have stays on meta.
    """
    loaded_modules = dict(loaded.named_modules())
    for name, module in list(model.named_modules()):
        loaded_module = loaded_modules.get(name)
        if loaded_module is None:
            continue
        if type(module) is nn.Linear:  # whatever the class of the loaded one, it computes what the layer stands for
            owner, _, key = name.rpartition(".")
            setattr(model.get_submodule(owner), key, loaded_module)
            continue
        parameters = own_parameters(module)
        loaded_parameters = own_parameters(loaded_module)
        parameters.update({key: loaded_parameters.get(key) for key in parameters})
        buffers = own_buffers(module)
        loaded_buffers = own_buffers(loaded_module)
        buffers.update({key: loaded_buffers.get(key, buffer) for key, buffer in buffers.items()})

"""Bottleneck adapters: a small network behind the attention and the feed-forward part of every block.

`h + up(activation(down(h)))` on a part's output, before the block adds it to its input (Houlsby et al. 2019,
arXiv:1902.00751); `pfeiffer` keeps the second only (Pfeiffer et al. 2020, arXiv:2005.00247). `up` starts at zero, so that
the model starts as the base. Neither peft nor an `adapters` library for this transformers has them.

To use an exported adapter elsewhere, load the base with transformers and call `load(model, directory)`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from strategies.errors import ConfigError
from strategies.runtime import derived_seed
from strategies.small_files import read_json_object
from trainer.tuning.base import BaseWeightsReader
from trainer.tuning.config import Activation, BottleneckConfig, Placement
from trainer.tuning.own_adapters import AddedParameters

ADAPTER_MODULE_NAME = "bottleneck"
CONFIG_FILE = "bottleneck_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
USUAL_ATTENTION_NAMES = ("self_attn", "attn", "self_attention", "attention")
USUAL_FEEDFORWARD_NAMES = ("mlp", "ffn", "feed_forward")
"""The usual names, within a block, of the modules behind whose outputs adapters stand."""
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    Activation.gelu: partial(F.gelu, approximate="none"),
    Activation.relu: F.relu,
    Activation.silu: F.silu,
    Activation.tanh: torch.tanh,
}


class BottleneckLayer(nn.Module):
    """Adds `up(activation(down(hidden)))` to `hidden [..., width]`."""

    def __init__(self, width: int, size: int, activation: Activation, dropout: float) -> None:
        super().__init__()
        self.down = nn.Linear(width, size)
        self.up = nn.Linear(size, width)
        self.activation = activation
        self.dropout = dropout

    def forward(self, hidden: Tensor) -> Tensor:
        inner = F.dropout(_ACTIVATIONS[self.activation](self.down(hidden)), self.dropout, self.training)
        return hidden + self.up(inner).to(hidden.dtype)


@dataclass(frozen=True, slots=True)
class AdaptedModuleNames:
    """The names, within a block, of the two modules behind whose outputs adapters stand."""

    attention: str
    feedforward: str


class Bottleneck(AddedParameters):
    """Trains bottleneck adapters; they are children of the base's own modules, so that a block is sharded with them."""

    config: BottleneckConfig

    def apply(self, model: nn.Module) -> nn.Module:
        """Freeze the model, and add bottleneck adapters to its blocks, on meta; new heads of a classifier train in full.

        Raises ConfigError, with the parts that a block has, if no block has the parts that adapters go behind.
        """
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        # Each forward pass asks anew: `reference` changes the flag.
        added = insert_adapters(model, self.config, is_active=lambda: self.is_active, device="meta")
        self._hidden_size: Any = model.config.hidden_size  # type: ignore[union-attr]
        for adapter_name, adapter in added.items():  # `is_added_parameter` reads the names
            self._added_names |= {f"{adapter_name}.{key}" for key, _ in adapter.named_parameters()}
        for name in self.new_heads:
            model.get_submodule(name).requires_grad_(True)
        return model

    def initial_value(self, name: str, shape: tuple[int, ...], base: BaseWeightsReader, seed: int) -> Tensor:
        """The initial value of an adapter's parameter: `down` as torch starts a linear layer, `up` zero, which adds nothing yet.

        `name`: its full name, such as `h.0.mlp.bottleneck.down.weight`. Drawn from `seed` and the adapter's name, without the
        base's weights (`base`).
        """
        layer, projection, key = name.rsplit(".", 2)
        if projection == "up":
            return torch.zeros(shape)
        bottleneck_size = shape[0]
        # A bias says nothing of the width, which bounds its initial values too.
        hidden_size = shape[1] if key == "weight" else self._hidden_size
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(derived_seed(seed, layer))
            return nn.Linear(hidden_size, bottleneck_size).get_parameter(key).detach()

    def save_adapter(
        self, model: nn.Module, trained: dict[str, Tensor], directory: Path, base_name: str, revision: str | None
    ) -> None:
        """Write the trained adapter into `directory`, for `load`: `bottleneck_config.json` and `adapter_model.safetensors`.

        `trained`: the full trainable tensors by the model's parameter names. `base_name`, `revision`: of the base model, for
        the config. Raises OSError or SafetensorError if a file cannot be written.
        """
        from safetensors.torch import save_file

        contiguous = {name: value.contiguous() for name, value in trained.items()}
        save_file(contiguous, directory / WEIGHTS_FILE, {"format": "pt"})
        settings = asdict(self.config)
        del settings["name"]  # always `bottleneck`, as the file's name says
        settings["base_model_name_or_path"] = base_name
        settings["revision"] = revision
        settings["task_type"] = "CAUSAL_LM"
        settings["num_labels"] = None
        # How transformers names its classifiers, such as BertForSequenceClassification.
        if "SequenceClass" in type(model).__name__:
            settings["task_type"] = "SEQ_CLS"
            settings["num_labels"] = model.config.num_labels  # type: ignore[union-attr]
        (directory / CONFIG_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def load(model: nn.Module, directory: str | Path) -> nn.Module:
    """Put the exported adapters of `directory` into a base model that transformers loaded, in place, and return that model.

    For users of an adapter outside of training. Heads that were trained with the adapters replace the model's own; files
    without heads leave these as they are. Raises ConfigError if the model lacks a module of the files, or if an adapter lacks
    its values in the files.
    """
    from safetensors.torch import load_file

    directory = Path(directory)
    stored = read_json_object(directory / CONFIG_FILE)
    settings = BottleneckConfig(
        placement=Placement(stored["placement"]),
        size=stored["size"],
        activation=Activation(stored["activation"]),
        dropout=stored["dropout"],
        attention=stored["attention"],
        feedforward=stored["feedforward"],
    )
    insert_adapters(model, settings)
    # Not strict: the file has the adapters (and heads) alone, so that every weight of the base is missing in it.
    load_report = model.load_state_dict(load_file(directory / WEIGHTS_FILE), strict=False)
    missing_keys = [name for name in load_report.missing_keys if f".{ADAPTER_MODULE_NAME}." in name]
    differing_keys = missing_keys + load_report.unexpected_keys
    if differing_keys:
        raise ConfigError(f"{directory}: the adapter does not fit this model ({differing_keys[0]})")
    return model


def insert_adapters(
    model: Any, config: BottleneckConfig, *, is_active: Callable[[], bool] = lambda: True, device: str | None = None
) -> dict[str, BottleneckLayer]:
    """Add bottleneck adapters to every block of `model`, in place. Returns the adapters by name.

    Each block gets one behind its feed-forward module and, unless the placement is `pfeiffer`, one behind its attention. With
    `device` the adapters are float32 on that device (meta, for training); without it they have the device and the type of the
    module that they stand behind. `is_active` is called in each forward pass: if it is false, the adapters change nothing.

    Raises ConfigError if no block has both modules.
    """
    names_by_block: dict[str, AdaptedModuleNames] = {}
    for name, module in model.named_modules():
        adapted_names = _adapted_module_names(module, config)
        if adapted_names is not None:
            names_by_block[name] = adapted_names
    if not names_by_block:
        raise ConfigError(_no_parts_message(model, config))
    added = {}
    for block, names in names_by_block.items():
        chosen_names = [names.attention, names.feedforward]
        if config.placement is Placement.pfeiffer:
            chosen_names = [names.feedforward]
        for adapted_name in chosen_names:
            adapted = model.get_submodule(f"{block}.{adapted_name}")
            weight = next(adapted.parameters())
            layer = BottleneckLayer(model.config.hidden_size, config.size, config.activation, config.dropout)
            layer.to(device=device or weight.device, dtype=torch.float32 if device else weight.dtype)
            # As a child of the module that it follows, so that a sharding engine gathers both together.
            adapted.add_module(ADAPTER_MODULE_NAME, layer)
            adapted.register_forward_hook(partial(_apply_adapter, is_active))
            added[f"{block}.{adapted_name}.{ADAPTER_MODULE_NAME}"] = layer
    return added


def _apply_adapter(is_active: Callable[[], bool], owner: nn.Module, _args: Any, output: Any) -> Any:
    """A forward hook: the adapter of `owner` on its output, or on the first of several outputs."""
    if not is_active():
        return output
    layer: Any = owner.get_submodule(ADAPTER_MODULE_NAME)
    if isinstance(output, tuple):
        return (layer(output[0]), *output[1:])
    return layer(output)


def _adapted_module_names(module: nn.Module, config: BottleneckConfig) -> AdaptedModuleNames | None:
    """Find the attention and the feed-forward module in `module`, by name; None if it lacks one, so that it is no block.

    `tuning.attention` and `tuning.feedforward` name them; the usual names are tried for one that is not set. A block of Llama
    gives `AdaptedModuleNames("self_attn", "mlp")`, one of BERT `AdaptedModuleNames("attention.output.dense", "output.dense")`.
    """
    descendants = {name for name, _ in module.named_modules()}
    children = dict(module.named_children())
    attention = config.attention
    feedforward = config.feedforward
    if attention is None:
        attention = next((name for name in USUAL_ATTENTION_NAMES if name in children), None)
        # BERT's kind adds the input inside its attention module: the adapter stands before that, behind the dense layer.
        if attention is not None and f"{attention}.output.dense" in descendants:
            attention = f"{attention}.output.dense"
    if feedforward is None:
        feedforward = next((name for name in USUAL_FEEDFORWARD_NAMES if name in children), None)
        # BERT's kind has no module around the two layers of its feed-forward part.
        if feedforward is None and "intermediate" in children and "output.dense" in descendants:
            feedforward = "output.dense"
    if attention is None or feedforward is None or not {attention, feedforward} <= descendants:
        return None
    return AdaptedModuleNames(attention, feedforward)


def _no_parts_message(model: nn.Module, config: BottleneckConfig) -> str:
    """Write the error message for a model none of whose blocks has an attention and a feed-forward part to put adapters behind.

    It lists the modules that a block has, so that the user can name two of them.
    """
    set_options = []
    for key in ("attention", "feedforward"):
        if getattr(config, key):
            set_options.append(f"tuning.{key}={getattr(config, key)}")
    # Blocks stand in lists of modules; the first of each list speaks for all.
    names: set[str] = set()
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module):
            names.update(name for name, _ in module[0].named_modules() if name)
    module_names = sorted(names)
    return (
        f"{' '.join(set_options) or 'tuning=bottleneck'}: no block has both an attention and a feed-forward part of that name; "
        f"blocks here hold {', '.join(module_names) or 'nothing'}; set tuning.attention and tuning.feedforward to two of them"
    )

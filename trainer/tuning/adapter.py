"""Adapters through peft, whatever the method: chooses and checks targets, and manages what peft adds to the model.

Values come from `trainer.tuning.replica`. `trainer.tuning.table` says what a method can do.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from strategies.compat.modules import own_buffers, own_parameters
from strategies.errors import ConfigError
from trainer.tuning.adapter_checkpoint import StoredAdapter, check_settings
from trainer.tuning.base import AdapterConfig, BaseReader, LoraConfig
from trainer.tuning.compat.peft import adapters_off, targets_as_named
from trainer.tuning.expert_lora import choose
from trainer.tuning.peft_configs import peft_config
from trainer.tuning.replica import ADAPTER, AdapterReplicas, Lone
from trainer.tuning.table import method_of, rewrites_base
from trainer.tuning.targets import left_alone

PREFIX = "base_model.model."
"""Under which peft's wrapper holds the base model."""


class Adapter:
    """Adapters of one peft method on frozen weights."""

    adapter = True

    def __init__(
        self, config: AdapterConfig, *, train_embeddings: bool = False, new_heads: tuple[str, ...] = ()
    ) -> None:
        self.config = config
        self.converts = isinstance(config, LoraConfig) and rewrites_base(config.init)
        """Whether the adapter trains a part split off the base weights, so that its files must be converted."""
        self.keeps_base = not self.converts and config.from_ is None
        """Without the part that was split off, the base is not whole; with a first adapter, the base is not the start."""
        self.new_heads = new_heads
        """Modules that the base checkpoint does not have: trained in full and saved with the adapter."""
        self.train_embeddings = train_embeddings
        """New vocabulary entries need trained embeddings: they (and an untied head) are then trained in full."""
        self.replicas = AdapterReplicas(None, {}, reads_base=False)
        self.note = ""
        """What to say of the targets: linear layers that get no adapter, and why."""
        self.seed = 0
        """Seed of the initial values, as given with the first question for one."""
        self._owned: dict[str, tuple[str, str]] = {}
        self._buffers: set[str] = set()
        self._stored: StoredAdapter | None = None
        """The adapter that training goes on from."""

    def apply(self, model: nn.Module) -> nn.Module:
        """Wrap in a PeftModel; raises ConfigError that lists what exists when a target matches nothing."""
        if self.config.targets != []:
            check_targets(model, self.config.targets)
        settings = self._settings(model)
        with targets_as_named():
            tuned = self.wrap(model, settings)
        if self.config.from_ is not None:
            check_settings(tuned.peft_config[ADAPTER], self.config.from_, "tuning.from")  # type: ignore[index,union-attr]
            self._stored = StoredAdapter(self.config.from_, "tuning.from")
            self._stored.match(tuned)
            self._stored.fill_buffers(tuned)
        return tuned

    def wrap(self, model: nn.Module, settings: Any) -> nn.Module:
        """Let peft add what its `settings` say, and take stock of it."""
        from peft import get_peft_model

        known_buffers = {name for name, _ in model.named_buffers()}
        own_start = getattr(settings, "init_lora_weights", None)
        if self.converts:  # needs weights, which meta has not; replicas start as asked
            settings.init_lora_weights = True
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tuned: Any = get_peft_model(model, settings)  # type: ignore[arg-type]
        except (ValueError, TypeError, KeyError, RuntimeError, NotImplementedError) as error:
            raise ConfigError(
                f"tuning={self.config.name}: peft cannot add it to this model with tuning.targets={self.config.targets}: "
                f"{' '.join(str(error).split())[:300]}"
            ) from error
        of_replicas = copy.deepcopy(tuned.peft_config[ADAPTER])
        if self.converts:
            of_replicas.init_lora_weights = own_start
        self._take_stock(tuned, of_replicas)
        added = (name for name, _ in tuned.named_buffers(remove_duplicate=False))
        self._buffers = {name for name in added if self.base_name(name) not in known_buffers}
        return tuned

    def _settings(self, model: Any) -> Any:
        """peft's config with targets, task, and what trains in full."""
        settings = peft_config(self.config)
        targets = self.config.targets
        if targets != "auto":
            settings.target_modules = targets if isinstance(targets, str) else set(targets)
        elif (feedforward := getattr(settings, "feedforward_modules", None)) is not None:
            raise ConfigError(
                f"tuning.feedforward={list(feedforward)}: needs tuning.targets to name them too; list both, or neither"
            )
        full = list(dict.fromkeys([*self.config.modules_to_save, *self.new_heads]))
        tied = bool(getattr(model.config, "tie_word_embeddings", False))
        if self.train_embeddings:
            full += [_name_of(model, model.get_input_embeddings())]
            if not tied:
                full += [_name_of(model, model.get_output_embeddings())]
            elif not hasattr(settings, "ensure_weight_tying"):
                raise ConfigError(
                    f"model.add_tokens with tuning={self.config.name}: peft keeps trained embeddings tied to the head only "
                    "for LoRA; use tuning=lora, or tuning=full"
                )
            else:
                settings.ensure_weight_tying = True
        settings.modules_to_save = full or None
        if hasattr(settings, "exclude_modules"):
            settings.exclude_modules, self.note = left_alone(model, settings, every_linear=targets == "all-linear")
        settings.task_type = _task_type(model)
        if isinstance(self.config, LoraConfig):
            choose(settings, model, self.config)
        return settings

    def _take_stock(self, tuned: nn.Module, settings: Any) -> None:
        """Note what peft added, layer by layer, and make its buffers real."""
        from peft.tuners.lora import ParamWrapper
        from peft.tuners.tuners_utils import BaseTunerLayer

        bases: dict[str, nn.Module] = {}
        for name, module in tuned.named_modules():
            if not isinstance(module, BaseTunerLayer):
                continue
            assert isinstance(module, nn.Module)  # peft's class is a mixin of modules
            layer, base = name.removeprefix(PREFIX), module.get_base_layer()
            if isinstance(module, ParamWrapper):  # of a module with several adapted parameters one lies in the other
                layer = f"{self.base_name(name)}.{module.parameter_name}"
                flipped = getattr(base, "is_transposed", False)
                bases[layer] = Lone(module.parameter_name, module.get_param(), is_transposed=flipped)
            else:
                bases[layer] = copy.deepcopy(base)
            for key, _ in module.named_parameters():
                if not key.startswith("base_layer."):
                    self._owned[f"{name}.{key}"] = layer, key
                    _to_meta(module, key)
        if self.converts:
            _refuse_shared(tuned, bases)
        self.replicas = AdapterReplicas(
            settings, bases, reads_base=method_of(self.config).reads_base or _is_dora(self.config)
        )
        on_meta = {name for name, buffer in tuned.named_buffers() if buffer.is_meta}
        if on_meta:
            for name, buffer in self.replicas.buffers():
                if f"base_model.{name}" in on_meta:
                    owner, _, key = f"base_model.{name}".rpartition(".")
                    own_buffers(tuned.get_submodule(owner))[key] = buffer

    def settle_files(self, model: nn.Module, trained: dict[str, Tensor]) -> None:
        """What peft's settings must say of the gathered values, before these are written; nothing for most methods."""

    def merge(self, model: nn.Module) -> nn.Module:
        """Fold a loaded PeftModel's adapters into its weights; returns the plain model."""
        return model.merge_and_unload()  # type: ignore[operator]

    @contextmanager
    def reference(self, model: nn.Module) -> Iterator[None]:
        """Switch the adapters off, and modules trained in full back to their originals.

        Only flags change, so that an engine may gather parameters meanwhile.
        """
        with adapters_off(model):
            yield

    def base_name(self, name: str) -> str:
        """The name a wrapped parameter has in the base model's checkpoint."""
        name = name.removeprefix(PREFIX)
        for wrapper in (".base_layer", ".original_module", f".modules_to_save.{ADAPTER}"):
            name = name.replace(wrapper, "")
        return name

    def owns(self, name: str) -> bool:
        """What peft added, buffers included; modules trained in full start as copies of the base's."""
        return name in self._owned or name in self._buffers

    def rewrites(self, name: str) -> bool:
        """The weights off which the adapter's start was split, and modules that an earlier run trained in full."""
        if self._stored is not None and name in self._stored.names:
            return True
        return self.converts and name.endswith(".base_layer.weight")

    def rate_of(self, name: str) -> float:
        """LoRA+: the B matrices of linear layers learn faster."""
        if isinstance(self.config, LoraConfig) and f".lora_B.{ADAPTER}." in name:
            return self.config.lr_ratio
        return 1.0

    def initial_value(self, name: str, shape: tuple[int, ...], base: BaseReader, seed: int) -> Tensor:
        """The full initial tensor of a parameter that peft added or changed, float32, drawn from (seed, layer name)."""
        self.seed = seed
        if self._stored is not None and name in self._stored.names:
            return self._stored.tensor(name).view(shape)
        if name in self._owned:
            layer, key = self._owned[name]
        else:
            layer, _, key = name.removeprefix(PREFIX).rpartition(".base_layer.")
            key = f"base_layer.{key}"
        value = self.replicas.initial(layer, base, seed).get_parameter(key).detach()
        assert tuple(value.shape) == shape or tuple(value.shape) == (), (name, value.shape, shape)
        return value

    def changed(self) -> set[str]:
        """Base names of the parameters that the adapters change."""
        bases = self.replicas.bases.items()
        alone = {name for name, base in bases if isinstance(base, Lone)}
        return alone | {
            f"{name}.{key}" for name, base in bases if name not in alone for key, _ in base.named_parameters()
        }

    def layer_of(self, name: str) -> tuple[str, str]:
        """The adapted layer that would change a base parameter, and the parameter's name in it; it need not be there."""
        layer, _, key = name.rpartition(".")
        return (name if name in self.replicas.bases else layer), key

    def names_of(self, layer: str) -> list[str]:
        """What peft added for an adapted layer, by full name."""
        return [name for name, (owner, _) in self._owned.items() if owner == layer]

    def merged(self, name: str, base: BaseReader, trained: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        """The base parameters of the adapted layer `name` with its part of `trained` folded in; see `AdapterReplicas.merged`."""
        of_layer = {
            key: trained[full] for full, (layer, key) in self._owned.items() if layer == name and full in trained
        }
        alone = isinstance(self.replicas.bases[name], Lone)
        live = model if alone else model.get_submodule(PREFIX + name)
        return self.replicas.merged(name, base, self.seed, of_layer, live)

    def starts(self, trained: dict[str, Tensor], base: BaseReader) -> dict[str, Tensor]:
        """The initial values of the parameters in `trained` that peft added."""
        return {
            name: self.initial_value(name, tuple(value.shape), base, self.seed)
            for name, value in trained.items()
            if name in self._owned
        }


def check_targets(model: nn.Module, targets: Any) -> None:
    """Raise ConfigError, with what exists, where a target matches no module."""
    names = [name for name, _ in model.named_modules() if name]
    linear = sorted({n.rsplit(".", 1)[-1] for n, m in model.named_modules() if _is_linear(m)})
    if isinstance(targets, str):
        if targets not in ("all-linear", "auto") and not any(re.fullmatch(targets, name) for name in names):
            raise ConfigError(
                f"tuning.targets={targets!r}: no module name matches this expression; linear layers here are: "
                f"{', '.join(linear)}; or use tuning.targets=all-linear"
            )
        return
    unmatched = [t for t in targets if not any(n == t or n.endswith("." + t) for n in names)]
    if unmatched or not targets:
        raise ConfigError(
            f"tuning.targets={list(targets)}: {', '.join(unmatched) or 'nothing'} matches no module; linear layers "
            f"here are: {', '.join(linear)}; or use tuning.targets=all-linear"
        )


def _to_meta(layer: nn.Module, key: str) -> None:
    """Drop the values of a parameter that peft left on the CPU: they are drawn anew."""
    owner, _, last = key.rpartition(".")
    parameters = own_parameters(layer.get_submodule(owner))
    parameter = parameters[last]
    if parameter is not None and not parameter.is_meta:
        parameters[last] = nn.Parameter(parameter.data.to("meta"), parameter.requires_grad)


def _refuse_shared(tuned: nn.Module, bases: dict[str, nn.Module]) -> None:
    """A weight that two modules share cannot lose a part in one of them."""
    seen: dict[int, str] = {}
    for name, parameter in tuned.named_parameters(remove_duplicate=False):
        first = seen.setdefault(id(parameter), name)
        for layer in bases:
            if first != name and any(n.startswith(f"{PREFIX}{layer}.base_layer.") for n in (first, name)):
                raise ConfigError(
                    f"tuning.init: {layer} shares its weight with another module, which would change too; leave it out of "
                    "tuning.targets, or use tuning.init=default"
                )


def _is_dora(config: AdapterConfig) -> bool:
    return isinstance(config, LoraConfig) and (config.dora or rewrites_base(config.init))


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _task_type(model: nn.Module) -> str:
    """How peft calls what the model does; loaders of the adapter go by it."""
    if hasattr(model, "num_labels") and "SequenceClass" in type(model).__name__:
        return "SEQ_CLS"
    return "SEQ_2_SEQ_LM" if getattr(model.config, "is_encoder_decoder", False) else "CAUSAL_LM"


def _name_of(model: nn.Module, wanted: Any) -> str:
    return next(name for name, module in model.named_modules() if module is wanted)

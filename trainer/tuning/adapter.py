"""Adapters through peft, whatever the method: chooses and checks targets, and manages what peft adds to the model.

Values come from `trainer.tuning.replica`. `trainer.tuning.table` says what a method can do.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from strategies.compat.modules import own_buffers, own_parameters
from strategies.errors import ConfigError
from trainer.tuning.adapter_checkpoint import StoredAdapter, check_same_adapter_settings
from trainer.tuning.base import AdapterConfig, BaseWeightsReader, LoraConfig
from trainer.tuning.compat.peft import adapters_off, scale_outputs_if_architecture_unknown, without_target_renaming
from trainer.tuning.expert_lora import choose_expert_targets
from trainer.tuning.peft_configs import peft_config
from trainer.tuning.replica import ADAPTER, AdaptedLayerBuilder, SingleParameterLayer
from trainer.tuning.table import method_of, rewrites_base
from trainer.tuning.targets import excluded_modules, low_reach_note, num_weights_by_linear_layer, unsuitable_layers

PEFT_PREFIX = "base_model.model."
"""Under which peft's wrapper holds the base model."""


class Adapter:
    """A tuning method of peft, such as LoRA: adapters that train on frozen weights. An instance belongs to one model."""

    adapter = True

    def __init__(
        self, config: AdapterConfig, *, train_embeddings: bool = False, new_heads: tuple[str, ...] = ()
    ) -> None:
        """`train_embeddings`: the vocabulary grew.

        `new_heads`: names of modules that the base checkpoint does not have. Changes no model yet.
        """
        self.config = config
        self.needs_conversion = isinstance(config, LoraConfig) and rewrites_base(config.init)
        """Whether the adapter trains a part split off the base weights, so that its files must be converted."""
        self.keeps_base = not self.needs_conversion and config.from_ is None
        """Whether switching the adapter off gives the model before training. Not so if a part was split off the base, or if the
        run continues from an adapter."""
        self.new_heads = new_heads
        """Modules that the base checkpoint does not have. They train in full and are saved with the adapter."""
        self.has_grown_embeddings = train_embeddings
        """Whether the vocabulary grew: the embeddings, and a head that is not tied to them, then train in full."""
        self.layer_builder = AdaptedLayerBuilder(None, {}, reads_base=False)
        """Builds single adapted layers outside the model, for their initial values and for merging; `wrap_in_peft` sets it."""
        self.note = ""
        """A note for the start screen on linear layers that get no adapter, and why; or that typed targets reach few weights."""
        self.seed = 0
        """Seed of the initial values; set by `initial_value`, for merges later, since some methods draw frozen factors from
        it."""
        self._layer_and_key_by_name: dict[str, tuple[str, str]] = {}
        """(adapted layer, name in it) of each parameter that peft added, by its full name, such as
        `base_model.model.h.0.attn.lora_A.default.weight -> (h.0.attn, lora_A.default.weight)`."""
        self._added_buffer_names: set[str] = set()
        """Names of the buffers that peft added."""
        self._continued_adapter: StoredAdapter | None = None
        """The adapter that training continues from; None without one."""

    def apply(self, model: nn.Module) -> nn.Module:
        """Wrap a model, which is on meta, in a PeftModel as the settings say; open the adapter that training continues from.

        Sets `note`: which linear layers `all-linear` left out, or that typed targets reach few of the weights. Raises
        ConfigError if a target matches no module, or if the adapter of `tuning.from` does not fit.
        """
        if self.config.targets != []:  # empty: experts or routers alone
            check_targets_match_modules(model, self.config.targets)
        settings, self.note = self._peft_settings_and_note(model)
        num_weights_by_layer = num_weights_by_linear_layer(model)  # asked for before peft wraps these layers
        unsuitable = unsuitable_layers(model)
        with without_target_renaming():
            peft_model = self.wrap_in_peft(model, settings)
        has_typed_targets = self.config.targets not in ("all-linear", [])
        if has_typed_targets:  # then nothing was left out, and there is no other note
            adapted = self.layer_builder.base_layers
            self.note = low_reach_note(self.config.targets, num_weights_by_layer, adapted, unsuitable)
        if self.config.from_ is not None:
            self._continued_adapter = self._open_continued_adapter(peft_model, self.config.from_)
        return peft_model

    def _open_continued_adapter(self, peft_model: Any, directory: str) -> StoredAdapter:
        """Open the adapter in `directory` (`tuning.from`) that training continues from, and match it with `peft_model`.

        Also gives the buffers of `peft_model` their stored values; parameters get theirs later, from `initial_value`. Raises
        ConfigError if the adapter does not fit.
        """
        check_same_adapter_settings(peft_model.peft_config[ADAPTER], directory)
        adapter = StoredAdapter(directory, setting_name="tuning.from")
        adapter.match_names(peft_model)
        adapter.fill_buffers(peft_model)
        return adapter

    def wrap_in_peft(self, model: nn.Module, settings: Any) -> nn.Module:
        """Wrap a model, which is on meta, in a PeftModel with the adapters that peft's `settings` describe.

        Records which parameters and buffers peft added: `is_added_parameter` and `layer_builder` know them from then on. Raises
        ConfigError if peft refuses the settings for this model.
        """
        from peft import get_peft_model

        # Wrap.
        base_buffers = {name for name, _ in model.named_buffers()}
        lora_init = getattr(settings, "init_lora_weights", None)
        if self.needs_conversion:
            # PiSSA and OLoRA read base weights, which meta does not have. `layer_builder` makes these initial values later.
            settings.init_lora_weights = True
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                peft_model: Any = get_peft_model(model, settings)  # type: ignore[arg-type]
        except (ValueError, TypeError, KeyError, RuntimeError, NotImplementedError) as error:
            reason = " ".join(str(error).split())[:300]
            if self.config.targets == "auto" and "target_modules" in reason:
                module_names = ", ".join(names_of_modules_with_parameters(model))
                reason = f"it knows none for this architecture; set some of: {module_names}"
            raise ConfigError(
                f"tuning={self.config.name}: peft cannot add it to this model with tuning.targets={self.config.targets}: "
                f"{reason}"
            ) from error
        # Record what was added.
        settings_of_initial_values = copy.deepcopy(peft_model.peft_config[ADAPTER])
        if self.needs_conversion:
            settings_of_initial_values.init_lora_weights = lora_init
        self._record_adapters(peft_model, settings_of_initial_values)

        for name, _ in peft_model.named_buffers(remove_duplicate=False):
            if self.base_name(name) not in base_buffers:
                self._added_buffer_names.add(name)
        return peft_model

    def _peft_settings_and_note(self, model: Any) -> tuple[Any, str]:
        """Make peft's config for this run, and a note for the user on modules that `all-linear` leaves out ("" without any).

        The config has the method's options, which modules get adapters, which train in full, and the task. `model`: not wrapped
        yet. Raises ConfigError.
        """
        settings = peft_config(self.config)
        targets = self.config.targets
        feedforward = getattr(settings, "feedforward_modules", None)  # of IA3, whose config alone has them
        if targets == "auto" and feedforward is not None:
            raise ConfigError(
                f"tuning.feedforward={list(feedforward)}: needs tuning.targets to name them too; list both, or neither"
            )
        if targets != "auto":  # with auto peft chooses by the architecture
            settings.target_modules = targets if isinstance(targets, str) else set(targets)
            if hasattr(settings, "feedforward_modules") and feedforward is None:
                # IA3 scales the inputs of feed-forward layers and the outputs of others. peft knows the former for some
                # architectures only.
                scale_outputs_if_architecture_unknown(settings, model.config.model_type)
        settings.modules_to_save = self._fully_trained_module_names(model, settings) or None
        note = ""
        if hasattr(settings, "exclude_modules"):  # not every method of peft can exclude modules
            excluded = excluded_modules(model, settings, every_linear=targets == "all-linear")
            settings.exclude_modules = excluded.name_regex
            note = excluded.note
        settings.task_type = _peft_task_type(model)
        if isinstance(self.config, LoraConfig):
            choose_expert_targets(settings, model, self.config)
        return settings, note

    def _fully_trained_module_names(self, model: Any, peft_settings: Any) -> list[str]:
        """Names of the modules that train in full beside the adapters: those of the settings, new heads, grown embeddings.

        Such as `["score", "model.embed_tokens"]`. If grown embeddings are tied to the head, this also tells `peft_settings` to
        keep them tied. Raises ConfigError if peft cannot.
        """
        names = list(dict.fromkeys([*self.config.modules_to_save, *self.new_heads]))
        if not self.has_grown_embeddings:
            return names
        # The new rows must train in the head as well: it is another matrix, or tied to the embeddings.
        names.append(_submodule_name(model, model.get_input_embeddings()))
        if not getattr(model.config, "tie_word_embeddings", False):
            names.append(_submodule_name(model, model.get_output_embeddings()))
            return names
        # Of peft's configs LoRA's has this option, and AdaLoRA's, which extends it.
        if not hasattr(peft_settings, "ensure_weight_tying"):
            raise ConfigError(
                f"model.add_tokens with tuning={self.config.name}: peft keeps trained embeddings tied to the head only "
                "for LoRA; use tuning=lora, or tuning=full"
            )
        peft_settings.ensure_weight_tying = True
        return names

    def _record_adapters(self, peft_model: nn.Module, settings: Any) -> None:
        """Record the parameters that peft added to each layer, and make `self.layer_builder`, which gives initial values.

        Also changes `peft_model`: parameters that peft left on the CPU move to meta; buffers that are on meta get their values,
        since no rank draws these later. `settings`: peft's config with the initial values that the run asks for.

        An entry of `self._layer_and_key_by_name`: base_model.model.h.0.attn.lora_A.default.weight -> (h.0.attn,
        lora_A.default.weight).
        """
        # Adapted layers, and copies of the base layers under them.
        from peft.tuners.lora import ParamWrapper
        from peft.tuners.tuners_utils import BaseTunerLayer

        base_layers: dict[str, nn.Module] = {}  # by name in the base model
        for name, module in peft_model.named_modules():
            if not isinstance(module, BaseTunerLayer):
                continue
            assert isinstance(module, nn.Module)  # peft's class is a mixin of modules
            layer = name.removeprefix(PEFT_PREFIX)
            base = module.get_base_layer()
            if isinstance(module, ParamWrapper):  # one parameter; of several in a module, the wrappers are nested
                layer = f"{self.base_name(name)}.{module.parameter_name}"
                is_transposed = getattr(base, "is_transposed", False)
                base_layers[layer] = SingleParameterLayer(
                    module.parameter_name, module.get_param(), is_transposed=is_transposed
                )
            else:
                base_layers[layer] = copy.deepcopy(base)
            for key, _ in module.named_parameters():
                if not key.startswith("base_layer."):
                    self._layer_and_key_by_name[f"{name}.{key}"] = layer, key
                    _move_parameter_to_meta(module, key)

        if self.needs_conversion:
            _refuse_shared_weights(peft_model, base_layers)
        reads_base = method_of(self.config).reads_base or _lora_init_reads_base(self.config)
        self.layer_builder = AdaptedLayerBuilder(settings, base_layers, reads_base=reads_base)

        # Values of the buffers that are on meta.
        meta_buffers = {name for name, buffer in peft_model.named_buffers() if buffer.is_meta}
        if not meta_buffers:
            return
        for name, buffer in self.layer_builder.buffers():
            full_name = f"base_model.{name}"
            if full_name in meta_buffers:
                owner, _, key = full_name.rpartition(".")
                own_buffers(peft_model.get_submodule(owner))[key] = buffer

    def update_peft_settings(
        self, model: nn.Module, trained: dict[str, Tensor], saved_state: Callable[[str, str], Tensor]
    ) -> None:
        """Bring peft's settings in line with the trained values before an adapter is written. Most methods need nothing.

        `trained`: full tensors by name. `saved_state(name, key)`: what the checkpoint keeps under `key` for the parameter
        `name`.
        """

    def merge(self, model: nn.Module) -> nn.Module:
        """Merge a loaded PeftModel's adapters into its weights; returns the plain model."""
        return model.merge_and_unload()  # type: ignore[operator]

    @contextmanager
    def reference(self, model: nn.Module) -> Iterator[None]:
        """Within it, `model` computes as the reference: without adapters, and with the originals of modules trained in full.

        Only flags change, so that an engine may gather parameters meanwhile.
        """
        with adapters_off(model):
            yield

    def base_name(self, name: str) -> str:
        """The name that a parameter of the wrapped model has in the base model: `base_model.model.h.0.base_layer.weight` ->
        `h.0.weight`.
        """
        name = name.removeprefix(PEFT_PREFIX)
        for wrapper in (".base_layer", ".original_module", f".modules_to_save.{ADAPTER}"):
            name = name.replace(wrapper, "")
        return name

    def is_added_parameter(self, name: str) -> bool:
        """Whether peft added this parameter or buffer. Modules that train in full are not owned: they start as copies."""
        return name in self._layer_and_key_by_name or name in self._added_buffer_names

    def rewrites(self, name: str) -> bool:
        """Whether a base weight starts at another value than the checkpoint's: a part was split off, or it was trained before."""
        if self._continued_adapter is not None and name in self._continued_adapter.file_key_by_name:
            return True
        return self.needs_conversion and name.endswith(".base_layer.weight")

    def lr_factor(self, name: str) -> float:
        """The learning rate of a parameter as a multiple of the run's. LoRA+: the B matrices of linear layers learn faster."""
        if isinstance(self.config, LoraConfig) and f".lora_B.{ADAPTER}." in name:
            return self.config.lr_ratio
        return 1.0

    def initial_value(self, name: str, shape: tuple[int, ...], base: BaseWeightsReader, seed: int) -> Tensor:
        """The full initial value of a parameter that peft added or changed, float32: each rank takes its shard of it.

        - the adapter in `tuning.from` stores the parameter: the stored value.
        - peft added the parameter: peft's own initial value, drawn from `seed` and the layer's name.
        - else it is a base weight from which PiSSA or OLoRA split a part off: the rest of the weight.

        `shape`: that of the full parameter. `base` reads base weights, from which some initial values are computed. Remembers
        `seed` for `merged_parameters`.
        """
        self.seed = seed
        if self._continued_adapter is not None and name in self._continued_adapter.file_key_by_name:
            return self._continued_adapter.tensor(name).view(shape)
        if name in self._layer_and_key_by_name:
            layer, key = self._layer_and_key_by_name[name]
        else:  # such as base_model.model.h.0.attn.base_layer.weight -> (h.0.attn, base_layer.weight)
            layer, _, key_in_base_layer = name.removeprefix(PEFT_PREFIX).rpartition(".base_layer.")
            key = f"base_layer.{key_in_base_layer}"
        tensor = self.layer_builder.initial_layer(layer, base, seed).get_parameter(key).detach()
        # A single number may come in another shape: an engine that flattens parameters has it as [1].
        assert tuple(tensor.shape) == shape or tuple(tensor.shape) == (), (name, tensor.shape, shape)
        return tensor

    def changed_base_names(self) -> set[str]:
        """Base names of the parameters that the adapters change."""
        names = set()
        for name, base in self.layer_builder.base_layers.items():
            if isinstance(base, SingleParameterLayer):
                names.add(name)
            else:
                names.update(f"{name}.{key}" for key, _ in base.named_parameters())
        return names

    def layer_and_key_of(self, name: str) -> tuple[str, str]:
        """(the layer that holds a base parameter, the parameter's name in it): `h.0.attn.weight` -> ("h.0.attn", "weight").

        An expert parameter that is adapted by itself counts as a layer. The layer need not be an adapted one.
        """
        layer, _, key = name.rpartition(".")
        if name in self.layer_builder.base_layers:  # adapted by itself
            layer = name
        return layer, key

    def added_parameter_names(self, layer: str) -> list[str]:
        """Full names of the parameters that peft added for an adapted layer."""
        return [name for name, (owner, _) in self._layer_and_key_by_name.items() if owner == layer]

    def merged_parameters(
        self, name: str, base: BaseWeightsReader, trained: Mapping[str, Tensor], model: nn.Module
    ) -> dict[str, Tensor]:
        """Merge the adapter of the layer `name` into its weights, for an export without adapters.

        Returns {name in the layer: float32 weight}. `name`: in the base model, such as `h.0.attn`. `base` reads the base
        weights. `trained`: full tensors of adapters by full name, also those of other layers. `model`: the tuned model, from
        which the adapter's buffers are copied. Frozen factors that the seed gives, as VeRA has them, are drawn again.
        """
        trained_in_layer = {}
        for full_name, (layer, key) in self._layer_and_key_by_name.items():
            if layer == name and full_name in trained:
                trained_in_layer[key] = trained[full_name]
        if isinstance(self.layer_builder.base_layers[name], SingleParameterLayer):
            buffer_source = model  # its name is a parameter's, not a module's; such layers have no buffers
        else:
            buffer_source = model.get_submodule(PEFT_PREFIX + name)
        return self.layer_builder.merged_parameters(name, base, self.seed, trained_in_layer, buffer_source)

    def initial_values(self, trained: dict[str, Tensor], base: BaseWeightsReader) -> dict[str, Tensor]:
        """The values that the parameters in `trained` had before training, of those that peft added: {name: float32 tensor}."""
        values = {}
        for name, tensor in trained.items():
            if name in self._layer_and_key_by_name:
                values[name] = self.initial_value(name, tuple(tensor.shape), base, self.seed)
        return values


def check_targets_match_modules(model: nn.Module, targets: Any) -> None:
    """Raise ConfigError, with the linear layers, if a target of `tuning.targets` matches no module of `model` (not wrapped yet).

    `targets` is one of:

    - `all-linear` or `auto`: nothing to check.
    - another text: a regular expression on whole module names, such as `.*\\.mlp\\..*`.
    - a list: each entry is a module's name or its last parts; `q_proj` matches `layers.0.self_attn.q_proj`.
    """
    module_names = []
    linear_names: set[str] = set()  # last parts, such as q_proj
    for name, module in model.named_modules():
        if name:
            module_names.append(name)
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":  # GPT-2's linear layer
            linear_names.add(name.rsplit(".", 1)[-1])
    advice = f"linear layers here are: {', '.join(sorted(linear_names))}; or use tuning.targets=all-linear"

    if isinstance(targets, str):
        # peft chooses the modules itself for these two values, and matches any other text against whole names.
        if targets in ("all-linear", "auto"):
            return
        if not any(re.fullmatch(targets, name) for name in module_names):
            raise ConfigError(f"tuning.targets={targets!r}: no module name matches this expression; {advice}")
        return
    unmatched = []
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in module_names):
            unmatched.append(target)
    if unmatched or not targets:
        raise ConfigError(
            f"tuning.targets={list(targets)}: {', '.join(unmatched) or 'nothing'} matches no module; {advice}"
        )


def names_of_modules_with_parameters(model: nn.Module) -> list[str]:
    """The last parts of the names of modules with parameters of their own, each once, sorted."""
    return sorted({name.rsplit(".", 1)[-1] for name, module in model.named_modules() if own_parameters(module)})


def _move_parameter_to_meta(layer: nn.Module, key: str) -> None:
    """Drop the values of a parameter that peft left on the CPU: they are drawn again later, the same on every rank.

    `key`: the parameter's name in the adapted layer, such as `lora_A.default.weight`.
    """
    owner, _, last = key.rpartition(".")
    parameters = own_parameters(layer.get_submodule(owner))
    parameter = parameters[last]
    if parameter is not None and not parameter.is_meta:
        parameters[last] = nn.Parameter(parameter.data.to("meta"), parameter.requires_grad)


def _refuse_shared_weights(peft_model: nn.Module, base_layers: dict[str, nn.Module]) -> None:
    """Raise ConfigError if an adapted layer shares its weight: splitting a part off it would change the other module too.

    Called for PiSSA and OLoRA, which split the adapter off the base weight. `base_layers`: the adapted layers by name in the
    base model, such as `h.0.attn.c_attn`.
    """
    # A shared parameter is one object that comes under several names.
    first_names: dict[int, str] = {}
    for name, parameter in peft_model.named_parameters(remove_duplicate=False):
        first_name = first_names.setdefault(id(parameter), name)
        if first_name == name:
            continue
        for layer in base_layers:
            prefix = f"{PEFT_PREFIX}{layer}.base_layer."
            if first_name.startswith(prefix) or name.startswith(prefix):
                raise ConfigError(
                    f"tuning.init: {layer} shares its weight with another module, which would change too; leave it out of "
                    "tuning.targets, or use tuning.init=default"
                )


def _lora_init_reads_base(config: AdapterConfig) -> bool:
    """Whether LoRA's initial values depend on base weights: DoRA's norms, or the split of PiSSA and OLoRA."""
    return isinstance(config, LoraConfig) and (config.dora or rewrites_base(config.init))


def _peft_task_type(model: nn.Module) -> str:
    """peft's name of what the model does; loaders of the adapter choose a model class by it."""
    if hasattr(model, "num_labels") and "SequenceClass" in type(model).__name__:
        return "SEQ_CLS"
    if getattr(model.config, "is_encoder_decoder", False):
        return "SEQ_2_SEQ_LM"
    return "CAUSAL_LM"


def _submodule_name(model: nn.Module, target: Any) -> str:
    """The name of the submodule `target` in `model`."""
    return next(name for name, module in model.named_modules() if module is target)

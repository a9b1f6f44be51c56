"""What adapters need of peft beside its public interface. Read in peft 0.21; tests/compat/test_peft.py calls each of them.

peft's public interface is what `peft`, `peft.tuners.lora` and `peft.tuners.tuners_utils` export. Everything else that the
project uses of peft stands here. peft is imported when a function is called, since composing a run must not import it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache, partial, wraps
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from strategies.imports import importing_without_gc


def load_peft() -> ModuleType:
    """Import peft, but without torch's compiler, whose import takes a third of a start.

    peft imports bitsandbytes where that is installed, and bitsandbytes hands functions to `torch.compile` while it is imported
    (seen in bitsandbytes 0.50). torch then loads its whole compiler, and most runs call none of these functions. So
    `torch.compile` is replaced during the import, and each function is compiled at its first call. Neither library has a
    setting for it.
    """
    # The model that gets an adapter is there already.
    with importing_without_gc("peft", freeze=False), _compile_at_first_call():
        import peft
    return peft


@contextmanager
def _compile_at_first_call() -> Iterator[None]:
    """Within it, `torch.compile` returns functions that compile when they are first called.

    bitsandbytes calls it while it is imported, which would load torch's compiler for functions that are hardly ever called.
    """
    torch_compile = torch.compile

    def compile_later(function: Callable[..., Any] | None = None, **settings: Any) -> Any:
        if function is None:  # used as a decorator with settings
            return partial(compile_later, **settings)
        compiled = cache(lambda: torch_compile(function, **settings))
        return wraps(function)(lambda *args, **kwargs: compiled()(*args, **kwargs))

    torch.compile = compile_later  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = torch_compile


@contextmanager
def without_target_renaming() -> Iterator[None]:
    """Within it, `get_peft_model` adapts exactly the modules and parameters that its settings name.

    Replaces `peft.utils.transformers_weight_conversion.convert_peft_config_for_transformers`. Some models had experts made of
    linear layers in transformers 4. For these, peft reads `gate_proj` and the like as the experts' parameters of today, even
    where a dense layer or a shared expert has that name. The project's targets are today's names. peft calls the function
    for every LoRA model of transformers and has no setting that leaves it out.
    """
    from peft.utils import transformers_weight_conversion as conversion

    convert = conversion.convert_peft_config_for_transformers
    conversion.convert_peft_config_for_transformers = lambda *_, **__: None
    try:
        yield
    finally:
        conversion.convert_peft_config_for_transformers = convert


def names_read_as_experts(model_type: str) -> frozenset[str]:
    """Names of linear layers that peft reads as experts when it loads a LoRA adapter for this `model_type`.

    Uses `_MODEL_TO_CONVERSION_PATTERN` and `_MOE_TARGET_MODULE_MAPPING` of `peft.utils.transformers_weight_conversion`. peft
    looks these tables up while it loads and offers no question for it.
    """
    from peft.utils import transformers_weight_conversion as conversion

    family = conversion._MODEL_TO_CONVERSION_PATTERN.get(model_type, model_type)
    return frozenset(conversion._MOE_TARGET_MODULE_MAPPING.get(family) or ())


def loaded_key_by_stored_key(
    model: nn.Module, peft_config: Any, keys: Iterable[str], adapter_name: str
) -> dict[str, str | None]:
    """Find out what key peft makes of each stored key when it loads an adapter file onto `model`; None: the tensor gets lost.

    Uses `peft.utils.transformers_weight_conversion.convert_peft_adapter_state_dict_for_transformers`, which is what
    `PeftModel.from_pretrained` calls. The public way would load a whole adapter for the answer.
    """
    from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers

    # peft gets an empty tensor for each key, so that a tensor can be recognised by its identity.
    markers = {key: torch.empty(0, device="meta") for key in keys}
    # A copy of `markers`, since peft changes the dict that it gets.
    converted = convert_peft_adapter_state_dict_for_transformers(model, peft_config, dict(markers), adapter_name)
    key_of_marker = {id(marker): key for key, marker in converted.items()}
    return {key: key_of_marker.get(id(marker)) for key, marker in markers.items()}


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Inside the context the model computes as its base: adapters add nothing, modules that train in full are as they were.

    Sets `_disable_adapters` of tuner layers and of `peft.utils.other.AuxiliaryTrainingWrapper`. peft's own `disable_adapter`
    also toggles `requires_grad`, and a parameter that a sharding engine gathers meanwhile would never get a gradient.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    layers: list[Any] = []
    for module in model.modules():
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            layers.append(module)
    flags = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, flag in zip(layers, flags, strict=True):
            layer._disable_adapters = flag


def peft_tensors_of_fully_trained_modules(
    model: nn.Module, trained: dict[str, Tensor], adapter: str
) -> dict[str, Tensor]:
    """The tensors of modules that train in full (`modules_to_save`), under the names that peft stores them by.

    `trained`: full tensors by plain name. Uses `peft.utils.other.AuxiliaryTrainingWrapper`. The public
    `get_peft_model_state_dict` does the same for most methods. For virtual tokens it calls the model's own encoder as well,
    whose parameters may be sharded.
    """
    from peft.utils.other import AuxiliaryTrainingWrapper

    stored: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if not isinstance(module, AuxiliaryTrainingWrapper):
            continue
        prefix = f"{name}."
        module_state = {}
        for full_name, tensor in trained.items():
            if full_name.startswith(prefix):
                module_state[full_name.removeprefix(prefix)] = tensor
        # The base class declares no state dict; each of its subclasses takes one.
        for key, tensor in module.adapter_state_dict(adapter, module_state).items():  # type: ignore[call-arg]
            stored[f"{prefix}{key}"] = tensor
    return stored


def is_adapted_attention(module: nn.Module) -> bool:
    """Whether a module is an attention that peft wrapped for LLaMA-Adapter.

    Uses `peft.tuners.adaption_prompt.layer._BaseAdaptedAttention`: peft exports the class for LLaMA, not the one for GPT-2.
    """
    from peft.tuners.adaption_prompt.layer import _BaseAdaptedAttention

    return isinstance(module, _BaseAdaptedAttention)


def scale_outputs_if_architecture_unknown(settings: Any, model_type: str) -> None:
    """Let IA3 scale the output of every target if peft knows no feed-forward modules of this `model_type`. Changes `settings`.

    IA3 scales the inputs of feed-forward modules instead. If none are set, peft takes those that it knows, and raises an error
    for an architecture of which it knows none.
    """
    from peft.utils import TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING

    if model_type not in TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING:
        settings.feedforward_modules = set()


def detach_word_embeddings(peft_model: Any) -> None:
    """Keep the embeddings of a PeftModel with virtual tokens from being a second module of it; they stay an attribute.

    peft sets `PeftModel.word_embeddings` to the base model's embeddings. That is a second name for one module, and whoever
    walks over the children, as sharding engines do, would meet it twice. peft needs the attribute and has no setting for it.
    """
    embeddings = peft_model.word_embeddings
    del peft_model.word_embeddings
    object.__setattr__(peft_model, "word_embeddings", embeddings)

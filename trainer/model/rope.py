"""Writes `model.positions` and `model.rope` into the configuration that a model is built from and exported with.

transformers 5 keeps what rotary positions are computed from in `rope_parameters`: one dictionary, or one for each type of
layer (`full_attention`, `sliding_attention`). A window never sees far, so only the layers of full attention are changed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from strategies.errors import ConfigError
from strategies.small_files import read_json_object
from trainer.model.config import ModelConfig, RopeConfig, RopeScaling

FULL_ATTENTION = "full_attention"
SCALABLE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
"""Rope types of a base that `model.rope.type` may replace. Others (`proportional`, `axial`) rotate in a way of their own."""
TYPES_BY_NUM_POSITIONS = ("dynamic", "longrope")
"""Rope types that rotate by `max_position_embeddings`, so that more positions alone would change every position."""
ORIGINAL_POSITIONS_KEY = "original_max_position_embeddings"
SCALING_KEYS = frozenset(
    {
        *("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
        *("short_factor", "long_factor", "low_freq_factor", "high_freq_factor", ORIGINAL_POSITIONS_KEY, "type"),
    }
)
"""Entries of `rope_parameters` that belong to its type, and go with it."""
YARN_KEYS_KEPT = frozenset({"beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"})
"""What a base of type `yarn` keeps if it is scaled further. Its `attention_factor` was that of the old factor."""
REASON_BY_UNFIT_SCALING = {
    (
        "mimo_v2_flash",
        "yarn",
    ): "transformers then rotates more of each head than the model does; use model.rope.type=linear",
}
"""Why a `model_type` cannot be scaled by a type, where transformers finds out only in the first step."""
CONFIG_FILE = "config.json"


def set_positions(hf_config: Any, config: ModelConfig) -> None:
    """Write `model.positions` and `model.rope` into transformers' configuration, in place, before the model is built from it.

    `hf_config`: that configuration. `config`: the model's settings. Does nothing if neither is set. Raises ConfigError for a
    model whose positions are not rotary, and for values that do not follow from each other.
    """
    if not positions_are_set(config):
        return
    text_config = hf_config.get_text_config()
    parameters = _rope_parameters(text_config, config)  # the dict in the configuration, which is changed below
    own_positions = getattr(text_config, "max_position_embeddings", None)
    if not isinstance(own_positions, int) or own_positions < 1:
        raise ConfigError(
            f"model.path={config.path}: its config.json has no max_position_embeddings, from which model.positions and "
            "model.rope count; leave them at null"
        )
    if config.rope.type is not None:
        _set_scaling(text_config, parameters, config, own_positions)
    elif config.positions is not None and parameters.get("rope_type") in TYPES_BY_NUM_POSITIONS:
        raise ConfigError(
            f"model.positions={config.positions}: the base rotates by rope type {parameters['rope_type']}, in which the number "
            "of positions changes how each of them is rotated; set model.rope.type=yarn as well, or leave both at null"
        )
    if config.rope.theta is not None:
        parameters["rope_theta"] = config.rope.theta
        if hasattr(text_config, "rope_theta"):  # transformers would take it for the truth where both are there
            text_config.rope_theta = config.rope.theta
    if config.positions is not None:
        text_config.max_position_embeddings = config.positions
    _raise_if_class_refuses(text_config, config)


def _raise_if_class_refuses(text_config: Any, config: ModelConfig) -> None:
    """Raise ConfigError if transformers refuses the rope parameters that were just set for this kind of model (Phi-3 takes
    `longrope` alone).
    """
    # What transformers itself says replaces the reason of the table, which is for what it does not find out here.
    reason = REASON_BY_UNFIT_SCALING.get((text_config.model_type, str(config.rope.type)))
    try:
        text_config.validate_rope()
    except (ValueError, LookupError, TypeError) as error:
        reason = " ".join(str(error).split())
    if reason is not None:
        settings = _position_settings_text(config)
        raise ConfigError(f"{settings}: not for a {text_config.model_type} (model.path={config.path}): {reason}")


def positions_are_set(config: ModelConfig) -> bool:
    """Whether a setting changes how the model rotates, or how many positions it has."""
    return config.positions is not None or config.rope != RopeConfig()


def require_rotary_parameters_in_use(model: Any, config: ModelConfig) -> None:
    """Raise ConfigError if settings of positions are set, and no module of the built `model` computes its rotation from them.

    Otherwise such a setting would be ignored silently. Does nothing if none is set.
    """
    if not positions_are_set(config):
        return
    parameters = model.config.get_text_config().rope_parameters
    for module in model.modules():
        # A rotary embedding keeps its (inverse) frequencies in a buffer of this name.
        rotates = any(name.endswith("inv_freq") for name, _ in module.named_buffers(recurse=False))
        # A model of several parts may have a configuration for each, beside the one that was changed (BLT).
        if rotates and getattr(getattr(module, "config", None), "rope_parameters", None) == parameters:
            return
    settings = _position_settings_text(config)
    raise ConfigError(
        f"{settings}: a {model.config.model_type} as model.path={config.path} configures it rotates nothing by its "
        "rope_parameters; leave them at null"
    )


def check_adapter_positions(directory: str, key: str, hf_config: Any, config: ModelConfig) -> None:
    """Raise ConfigError if an adapter was trained under other positions than the base has, and no setting says so.

    `directory`: of the adapter, the value of the setting `key` ("tuning.from"). `hf_config`: transformers' configuration of the
    base. Only an adapter whose training set `model.positions` or `model.rope` has a config.json beside it; others are not
    checked.
    """
    file = Path(directory).expanduser() / CONFIG_FILE
    if positions_are_set(config) or not file.is_file():
        return
    adapter_config = read_json_object(file)
    adapter_settings = adapter_config.get("text_config") or adapter_config
    base_settings = hf_config.get_text_config().to_dict()
    differing = []
    for name in ("max_position_embeddings", "rope_parameters"):
        if adapter_settings.get(name) != base_settings.get(name):
            differing.append(f"{name}={adapter_settings.get(name)}, not {base_settings.get(name)}")
    if differing:
        raise ConfigError(
            f"{key}={directory}: was trained with {' and '.join(differing)} ({file}); set model.positions and model.rope as in "
            "its training"
        )


def adapter_config_source(directory: Path, base: str) -> str:
    """The directory or hub id whose config.json says how the base of an adapter is built: its own if it has one."""
    return str(directory) if (directory / CONFIG_FILE).is_file() else base


def _rope_parameters(text_config: Any, config: ModelConfig) -> dict[str, Any]:
    """The dict of rope parameters in transformers' configuration `text_config`, to be changed in place.

    Some models have a dict for each kind of layer, such as {"full_attention": {...}, "sliding_attention": {...}}: then that of
    full attention, since windows never see far. Raises ConfigError for a model without rotary positions, with code of its own,
    or with none for full attention.
    """
    parameters: dict[str, Any] | None = getattr(text_config, "rope_parameters", None)
    settings = _position_settings_text(config)
    if not parameters or getattr(text_config, "alibi", False):
        raise ConfigError(
            f"{settings}: the positions of a {text_config.model_type} (model.path={config.path}) are not rotary: a table of "
            "learned positions cannot grow, and other kinds have no such setting; leave them at null, or choose a model with "
            "rotary positions, such as Llama or Qwen"
        )
    if not type(text_config).__module__.startswith("transformers."):
        raise ConfigError(
            f"{settings}: model.path={config.path} brings code of its own, which need not read rope_parameters; set them "
            "in its config.json as its authors say, and leave these at null"
        )
    if not text_config.nested_rope_parameter_keys(parameters):
        return parameters
    if not parameters.get(FULL_ATTENTION):
        raise ConfigError(
            f"{settings}: a {text_config.model_type} has rope parameters for {', '.join(parameters)}, and none for "
            f"{FULL_ATTENTION}, which alone is changed; set them in its config.json, and leave these at null"
        )
    full_attention: dict[str, Any] = parameters[FULL_ATTENTION]
    return full_attention


def _set_scaling(text_config: Any, parameters: dict[str, Any], config: ModelConfig, own_positions: int) -> None:
    """Replace the scaling of rotary positions in a configuration's rope parameters by that of `model.rope`, in place.

    `parameters`: the rope parameters. Afterwards they have, for example, `rope_type` "yarn" and `factor` 4.0. `own_positions`:
    the number of positions of the base. Raises ConfigError if the base's own scaling cannot be replaced, or if the factor is
    unknown or below 1.
    """
    scaling = config.rope.type
    original = _replaceable_positions(text_config, parameters, config, own_positions)
    factor = _scaling_factor(config, original)
    # Remove what belongs to the old scaling, then write the new one.
    had_original = ORIGINAL_POSITIONS_KEY in parameters
    was_yarn = parameters.get("rope_type", "default") == RopeScaling.yarn
    for key in SCALING_KEYS & parameters.keys():
        if scaling is RopeScaling.yarn and was_yarn and key in YARN_KEYS_KEPT:
            continue
        del parameters[key]
    parameters["rope_type"] = str(scaling)
    parameters["factor"] = float(factor)
    if scaling is RopeScaling.yarn or had_original:  # Ministral reads it in its attention too, whatever the type is
        parameters[ORIGINAL_POSITIONS_KEY] = original


def _replaceable_positions(
    text_config: Any, parameters: dict[str, Any], config: ModelConfig, own_positions: int
) -> int | None:
    """How many positions the base was trained with before it was scaled; None if that is not known, nor needed.

    `own_positions`: the number that its configuration has now. Raises ConfigError if the base's own scaling cannot be replaced
    by `model.rope.type`.
    """
    scaling = config.rope.type
    base_type = parameters.get("rope_type", "default")
    if base_type not in SCALABLE_TYPES:
        raise ConfigError(
            f"model.rope.type={scaling}: the base rotates by rope type {base_type}, which is not replaced here; set "
            "model.rope.theta or model.positions alone"
        )
    original = _original_positions(text_config, parameters, own_positions)
    if original is None and (scaling is RopeScaling.yarn or config.rope.factor is None):
        raise ConfigError(
            f"model.rope.type={scaling}: the base is scaled already (linear, by {parameters.get('factor')}), and its config.json "
            "does not say from how many positions; use model.rope.type=linear with model.rope.factor, or "
            f"write {ORIGINAL_POSITIONS_KEY} "
            "into its rope_parameters"
        )
    return original


def _scaling_factor(config: ModelConfig, original: int | None) -> float:
    """The factor that stretches positions: `model.rope.factor`, or `model.positions` over the `original` ones of the base.

    32768 positions over 8192 give 4. Raises ConfigError for a factor below 1.
    """
    factor = config.rope.factor
    if factor is None:
        assert config.positions is not None  # trainer/model/rules.py: position_problems
        assert original is not None
        factor = config.positions / original
    if factor < 1:
        raise ConfigError(
            f"model.positions={config.positions}: is less than the {original} positions that the base was trained with, and "
            "needs no scaling; leave model.rope.type at null"
        )
    return factor


def _original_positions(text_config: Any, parameters: dict[str, Any], own_positions: int) -> int | None:
    """How many positions the base was trained with before it was scaled; None if it is scaled (type linear) and does not say."""
    # Phi-3 and its kin have it beside rope_parameters, and transformers takes it from there first.
    recorded = getattr(text_config, ORIGINAL_POSITIONS_KEY, None) or parameters.get(ORIGINAL_POSITIONS_KEY)
    if recorded:
        return int(recorded)
    return None if parameters.get("rope_type") == RopeScaling.linear else own_positions


def _position_settings_text(config: ModelConfig) -> str:
    """The settings of positions that are set, for messages: `model.positions=32768, model.rope.type=yarn`."""
    rope = config.rope
    settings = {
        "model.positions": config.positions,
        "model.rope.type": rope.type,
        "model.rope.factor": rope.factor,
        "model.rope.theta": rope.theta,
    }
    return ", ".join(f"{name}={value}" for name, value in settings.items() if value is not None)

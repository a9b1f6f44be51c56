"""Makes peft's config objects from our settings, and lists the options of peft's own config classes."""

from __future__ import annotations

import difflib
from dataclasses import fields
from typing import Any

from strategies.errors import ConfigError
from trainer.tuning.base import AdapterConfig, LoraConfig
from trainer.tuning.compat.peft import load_peft
from trainer.tuning.config import (
    AdaLoraConfig,
    BoftConfig,
    Ia3Config,
    LohaConfig,
    LokrConfig,
    OftConfig,
    PeftConfig,
    PrefixConfig,
    PrefixInit,
    PTuningConfig,
    VeraConfig,
    VirtualConfig,
    peft_type_of,
)

_OWN_KEY_BY_OPTION = {"target_modules": "tuning.targets", "modules_to_save": "tuning.modules_to_save"}
"""Fields of peft's classes that have a setting here."""
_OPTIONS_WE_SET = (
    "target_modules",
    "modules_to_save",
    "peft_type",
    "task_type",
    "inference_mode",
    "base_model_name_or_path",
)
"""Fields of peft's classes that this project sets itself."""


def peft_config(tuning: AdapterConfig) -> Any:
    """Make peft's config of a tuning method with the method's own options; targets and the task are set by the caller.

    Raises ConfigError if peft refuses the options.
    """
    peft = load_peft()
    peft_type = peft_type_of(tuning)  # such as `lora`
    settings_class = peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(peft_type.upper())]
    try:
        return settings_class(**_peft_options(tuning))
    except (TypeError, ValueError, ImportError) as error:
        raise ConfigError(
            f"tuning={tuning.name}: peft refuses these options: {' '.join(str(error).split())}"
        ) from error


def _peft_options(config: AdapterConfig) -> dict[str, Any]:
    """Translate the settings of a tuning method into the options of peft's config class for it:

    {"r": 16, "lora_alpha": 32, ...}.
    """
    match config:
        case LoraConfig():
            return {
                "r": config.rank,
                "lora_alpha": config.alpha,
                "lora_dropout": config.dropout,
                "use_rslora": config.rslora,
                "use_dora": config.dora,
                "rank_pattern": dict(config.rank_pattern),
                "alpha_pattern": dict(config.alpha_pattern),
                "init_lora_weights": True if config.init == "default" else config.init,
            }
        case AdaLoraConfig():
            return _adalora_options(config)
        case Ia3Config():
            return {"feedforward_modules": list(config.feedforward) or None}
        case VeraConfig():
            return {
                "r": config.rank,
                "vera_dropout": config.dropout,
                "d_initial": config.d_initial,
                "projection_prng_key": config.projection_seed,
                "save_projection": config.save_projection,
            }
        case LohaConfig():
            return {"r": config.rank, "alpha": config.alpha}
        case LokrConfig():
            return {
                "r": config.rank,
                "alpha": config.alpha,
                "decompose_both": config.decompose_both,
                # 0 is our value for the most even split, and -1 is peft's.
                "decompose_factor": config.decompose_factor or -1,
            }
        case OftConfig():
            return {
                "oft_block_size": config.block_size,
                "block_share": config.block_share,
                "use_cayley_neumann": config.neumann_terms > 0,
                # peft wants a number of terms even if the series is not used.
                "num_cayley_neumann_terms": config.neumann_terms or 5,
            }
        case BoftConfig():
            return {
                "boft_block_size": config.block_size,
                "boft_n_butterfly_factor": config.num_factors,
                "boft_dropout": config.dropout,
            }
        case PeftConfig():
            return dict(config.options)
        case _:
            return {}


def _adalora_options(config: AdaLoraConfig) -> dict[str, Any]:
    """Translate AdaLoRA's settings into the options of peft's config class."""
    return {
        "init_r": config.init_rank,
        "target_r": config.target_rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "deltaT": config.delta_t,
        "beta1": config.beta1,
        "beta2": config.beta2,
        "orth_reg_weight": config.orth_reg_weight,
        "total_step": 1,  # `RankAllocation.begin` sets it once the run's steps are known; the phases follow from it
    }


def peft_config_of_virtual_tokens(config: VirtualConfig, task: str) -> Any:
    """Make peft's config of a method with virtual tokens (prompt, P- or prefix tuning); widths follow when it meets the model.

    `task`: peft's task type, such as `CAUSAL_LM`.
    """
    peft = load_peft()
    common = {"task_type": task, "num_virtual_tokens": config.num_virtual_tokens}
    if isinstance(config, PrefixConfig):
        return peft.PrefixTuningConfig(
            **common,
            prefix_projection=config.projection,
            encoder_hidden_size=config.encoder_hidden_size or None,
            init_weights="zero" if config.init is PrefixInit.zero else None,
        )
    if isinstance(config, PTuningConfig):
        return peft.PromptEncoderConfig(
            **common,
            encoder_reparameterization_type=str(config.encoder).upper(),
            encoder_hidden_size=config.encoder_hidden_size or None,
            encoder_num_layers=config.encoder_layers,
            encoder_dropout=config.dropout,
        )
    # Random for every `tuning.init`: peft would read a tokenizer or weights, and the tuning method (`virtual.py`) gives the
    # values itself.
    return peft.PromptTuningConfig(**common, prompt_tuning_init="RANDOM")


def option_problems(peft_type: str, options: dict[str, Any]) -> list[str]:
    """What is wrong with the options that a user gave to peft for `tuning=peft tuning.type=<peft_type>`, one line each.

    Imports peft, which knows its options.
    """
    peft = load_peft()
    settings_class = peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(peft_type.upper())]
    field_names = {field.name for field in fields(settings_class)}
    known_options = sorted(field_names - set(_OPTIONS_WE_SET))
    problems = []
    for name in options:
        key = f"tuning.options.{name}={options[name]}"
        if name in _OWN_KEY_BY_OPTION:
            problems.append(f"{key}: has a key of its own; set {_OWN_KEY_BY_OPTION[name]}")
        elif name not in known_options:
            close_matches = difflib.get_close_matches(name, known_options, n=1)
            hint = f"did you mean {close_matches[0]}?" if close_matches else f"it has {', '.join(known_options)}"
            problems.append(f"{key}: peft's {peft_type} has no such option; {hint}")
    # Then peft itself is asked: values may be wrong, or not go together.
    if not problems:
        try:
            settings_class(**options)
        except (TypeError, ValueError, ImportError) as error:
            problems.append(
                f"tuning.options: peft's {peft_type} refuses them ({' '.join(str(error).split())}); correct them"
            )
    return problems

"""Rules of a tuning method's settings, alone and with the rest of the run. One line a problem."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass

from strategies.base import ActivationCheckpointing, Precision, StrategyConfig
from strategies.errors import ConfigError
from trainer.data.config import DataConfig, Layout
from trainer.tuning.base import AdapterConfig, LoraConfig, TuningConfig
from trainer.tuning.config import (
    AdaLoraConfig,
    FreezeConfig,
    Ia3Config,
    PeftConfig,
    PromptConfig,
    PromptInit,
    VirtualConfig,
)
from trainer.tuning.freeze import LAYER_RANGE_REGEX
from trainer.tuning.initial_adapter import continuation_problems
from trainer.tuning.table import (
    PEFT_METHODS,
    SHARDED,
    TUNING_METHODS,
    UNSUPPORTED_TYPES,
    TuningMethod,
    method_of,
    rewrites_base,
)

INIT_REGEX = re.compile(r"default|gaussian|pissa|pissa_niter_[1-9]\d*|olora")


CHOICE_BY_PEFT_NAME = {
    "ln_tuning": "ln",
    "prompt_tuning": "prompt",
    "prefix_tuning": "prefix",
}
"""peft's names of methods that have another name here; those with the same name are in `TUNING_METHODS`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SettingsBesideTuning:
    """The settings of a run beside `tuning`, as far as a tuning method may not go with them."""

    strategy: StrategyConfig
    precision: Precision
    data: DataConfig
    merges_adapter: bool
    """Whether the export merges the adapter into the base (`export.merge`)."""
    has_new_head: bool = False
    """Whether the objective has a head of its own."""
    has_new_tokens: bool = False
    """Whether the vocabulary grows (`model.add_tokens`)."""
    is_encoder_decoder: bool = False
    quantisation: str = "none"
    """`model.quantisation`."""
    sequence_ranks: int = 1
    """Ranks that share each row of documents (`parallel.sequence`)."""
    expert_ranks: int = 1
    """Ranks over which the experts of a layer are sharded (`parallel.experts`)."""


def tuning_combination_problems(tuning: TuningConfig, run: SettingsBesideTuning) -> Iterator[str]:
    """Yield every problem of a tuning method's settings, alone and with the rest of the run, as `key=value: reason; remedy`.

    Called when a run is composed, before any model is loaded. `run`: the settings of the run beside `tuning`.
    """
    yield from _problems_of_tuning_alone(tuning)
    if isinstance(tuning, PeftConfig) and tuning.type not in PEFT_METHODS:
        return  # an unknown method has no row in the table
    method = method_of(tuning)  # what it can be combined with, and the reason for each combination that it cannot
    method_setting = f"tuning={tuning.name}"
    if isinstance(tuning, PeftConfig):
        method_setting = f"tuning.type={tuning.type}"
    yield from _strategy_problems(method, method_setting, run)
    yield from _layout_problems(method, method_setting, run.data)
    yield from _model_problems(method, method_setting, run)
    # A refusal of the table is the reason why the method cannot do it; empty if it can.
    if run.sequence_ranks > 1 and (reason := method.refusal_by_property.get("sequence")):
        yield (
            f"parallel.sequence={run.sequence_ranks} with {method_setting}: {reason}; set "
            "parallel.sequence=1, or use tuning=lora"
        )
    if run.expert_ranks > 1 and (reason := method.refusal_by_property.get("experts")):
        yield f"parallel.experts={run.expert_ranks} with {method_setting}: {reason}; set parallel.experts=1, or use tuning=lora"
    if run.quantisation != "none":
        yield from _quantisation_problems(tuning, method, method_setting, run.quantisation)
    if run.is_encoder_decoder and method.seq2seq_refusal:
        yield (
            f"{method_setting} with objective=seq2seq: {method.seq2seq_refusal}; use tuning=lora, or "
            "objective=sft with a causal model"
        )
    if run.merges_adapter and method.merge_refusal:
        yield f"export.merge=true with {method_setting}: {method.merge_refusal}; use export.merge=false"


def _problems_of_tuning_alone(tuning: TuningConfig) -> Iterator[str]:
    """Yield what is wrong with the settings of `tuning` by themselves, whatever the rest of the run, one line each."""
    # Several cases may hold: the settings of LoRA are those of an adapter too, and AdaLoRA's are those of LoRA.
    if isinstance(tuning, AdapterConfig):
        yield from _target_problems(tuning)
        yield from continuation_problems(tuning)
    if isinstance(tuning, FreezeConfig):
        yield from _freeze_problems(tuning)
    if isinstance(tuning, LoraConfig):
        yield from _lora_problems(tuning)
    if isinstance(tuning, AdaLoraConfig):
        yield from _adalora_problems(tuning)
    if isinstance(tuning, Ia3Config):
        yield from _ia3_problems(tuning)
    if isinstance(tuning, PromptConfig):
        yield from _prompt_problems(tuning)
    if isinstance(tuning, PeftConfig):
        yield from _peft_problems(tuning)


def _strategy_problems(method: TuningMethod, method_setting: str, run: SettingsBesideTuning) -> Iterator[str]:
    """Yield what the tuning method cannot do under the run's strategy, one line each.

    That is selective checkpointing, or half precision under strategies that convert parameters to it. `method`: its row in the
    table of methods, with the reason for each thing that it cannot do. `method_setting`: the method as the user sets it, such
    as `tuning=lora`.
    """
    checkpointing = run.strategy.activation_checkpointing
    if checkpointing is ActivationCheckpointing.selective and (reason := method.refusal_by_property.get("selective")):
        yield f"strategy.activation_checkpointing=selective with {method_setting}: {reason}; use full or none"
    converts_to_half = run.precision in (Precision.bf16, Precision.fp16) and run.strategy.name in SHARDED
    if converts_to_half and (reason := method.refusal_by_property.get("half")):
        yield (
            f"precision={run.precision} with {method_setting} and strategy={run.strategy.name}: {reason}; use fp32 or "
            "strategy=ddp"
        )


def _layout_problems(method: TuningMethod, method_setting: str, data: DataConfig) -> Iterator[str]:
    """Yield what a method that needs a row of its own for each document has against packed or padding-free data, line by line."""
    reason = method.refusal_by_property.get("padding_free")
    if not reason:
        return
    if data.packing:
        yield f"data.packing=true with {method_setting}: {reason}; set data.packing=false"
    if data.layout is Layout.padding_free:
        yield f"data.layout=padding_free with {method_setting}: {reason}; set data.layout=padded"


def _model_problems(method: TuningMethod, method_setting: str, run: SettingsBesideTuning) -> Iterator[str]:
    """Yield which parts of the run's model the method cannot train, one line each: a new head, or embeddings of new tokens."""
    if run.has_new_head and method.new_head_refusal:
        yield (
            f"{method_setting} with an objective that has a head of its own: {method.new_head_refusal}; use "
            "tuning=lora or tuning=prompt"
        )
    if run.has_new_tokens and method.new_tokens_refusal:
        yield f"model.add_tokens with {method_setting}: {method.new_tokens_refusal}; use tuning=lora or tuning=full"


def check_positions(
    tuning: TuningConfig,
    longest_document_tokens: int,
    max_positions: int | None,
    *,
    has_rotary_positions: bool,
    generated_tokens: int = 0,
) -> None:
    """Raise ConfigError if the longest document, with virtual tokens before it, has more tokens than the model has positions.

    `max_positions` of None: the model has no limit. `has_rotary_positions`: it can be given more of them. `generated_tokens`:
    those of the longest document that are the longest answer the model may generate, for the message; 0 without rounds.
    """
    if max_positions is None or max_positions < 1:  # XLNet has -1, which means any number
        return
    # The document alone, whatever the tuning method.
    if longest_document_tokens > max_positions:
        raise ConfigError(
            _positions_message(
                longest_document_tokens,
                max_positions,
                has_rotary_positions=has_rotary_positions,
                generated_tokens=generated_tokens,
            )
        )
    # The document behind its virtual tokens.
    if isinstance(tuning, VirtualConfig) and longest_document_tokens + tuning.num_virtual_tokens > max_positions:
        raise ConfigError(
            f"tuning.num_virtual_tokens={tuning.num_virtual_tokens}: the model has {max_positions} positions, and the longest "
            f"document takes {longest_document_tokens}; set data.max_length={max_positions - tuning.num_virtual_tokens}"
        )


def _positions_message(
    longest_document_tokens: int, max_positions: int, *, has_rotary_positions: bool, generated_tokens: int
) -> str:
    """Write the error message for a longest document that the model's `max_positions` positions do not hold, with what to set.

    `generated_tokens`: how many of its tokens are generated. `has_rotary_positions`: the model can be given more positions.
    """
    remedy = f"Set data.max_length={max_positions}"
    document = "document"
    if generated_tokens:
        document = f"prompt with an answer of {generated_tokens} tokens"
        remedy = "Set a smaller objective.rollout.max_new_tokens"
        if generated_tokens < max_positions:
            remedy += f", or data.max_length={max_positions - generated_tokens}"
    if has_rotary_positions:
        settings = f"model.positions={longest_document_tokens}, as a rule with model.rope.type=yarn"
        remedy += f", or give the model room: {settings} (docs/long-context.md)"
    else:
        remedy += ", or take a model with more positions: its own are not rotary, and cannot be extended"
    return (
        f"data: the longest {document} takes {longest_document_tokens} tokens, and the model has {max_positions} positions "
        f"(max_position_embeddings): what lies beyond was never learned, or is not there. {remedy}"
    )


def _prompt_problems(tuning: PromptConfig) -> Iterator[str]:
    """Yield what is wrong if `tuning.init` and `tuning.init_text` of prompt tuning do not go together."""
    has_text = bool((tuning.init_text or "").strip())
    if tuning.init is PromptInit.text and not has_text:
        yield "tuning.init=text: needs tuning.init_text, such as the instruction of the task; or use tuning.init=sampled"
    if tuning.init is not PromptInit.text and tuning.init_text is not None:
        yield f"tuning.init_text: is not used with tuning.init={tuning.init}; set tuning.init=text, or leave it out"


def _quantisation_problems(
    tuning: TuningConfig, method: TuningMethod, method_setting: str, quantisation: str
) -> Iterator[str]:
    """Yield why this tuning method, DoRA or the initial values cannot be used on a quantised base, one line each.

    `method_setting`: the method as the user sets it, for the messages, such as `tuning=lora`. `quantisation`: such as `nf4`.
    """
    setting = f"model.quantisation={quantisation}"
    if reason := method.refusal_by_property.get("quantised"):
        yield f"{setting} with {method_setting}: {reason}; use tuning=lora, or model.quantisation=none"
    if isinstance(tuning, LoraConfig) and tuning.dora:
        yield f"{setting} with tuning.dora=true: DoRA needs the norms of the base weights in every forward pass; set it false"
    if isinstance(tuning, LoraConfig) and rewrites_base(tuning.init):  # PiSSA and OLoRA split a part off each weight
        yield (
            f"{setting} with tuning.init={tuning.init}: what it leaves of each weight would be rounded anew, and the export no "
            "longer belong to the unchanged base; use tuning.init=default"
        )


def _target_problems(tuning: AdapterConfig) -> Iterator[str]:
    """Yield what is wrong with `tuning.targets`, which modules get adapters, one line each. The first case that holds:

    - an empty list, with LoRA on experts or routers alone: nothing.
    - empty otherwise, or neither text nor list: one line.
    - a list of names: nothing. Whether the names match is checked on the model.
    - the text `auto`, for a method that has another default: one line.
    - any text that is no regular expression: one line.
    """
    targets = tuning.targets
    if targets == [] and isinstance(tuning, LoraConfig) and (tuning.experts or tuning.router):
        return  # experts and routers alone
    if not isinstance(targets, str | list) or not targets:
        yield f"tuning.targets={targets}: must be all-linear, a regular expression or a list of module names"
        return
    if isinstance(targets, list):
        return
    default_targets = type(tuning)().targets
    if targets == "auto" and default_targets != "auto":
        yield f"tuning.targets=auto: tuning={tuning.name} has no choice of its own; use tuning.targets=all-linear"
    yield from _regex_problems("tuning.targets", targets, f"{default_targets} is the default")


def _regex_problems(key: str, pattern: str, advice: str) -> Iterator[str]:
    """The problem of the setting `key` if its value is not a regular expression. `advice`: what to give instead."""
    try:
        re.compile(pattern)
    except re.error as error:
        yield f"{key}={pattern}: not a regular expression ({error}); {advice}"


def _freeze_problems(tuning: FreezeConfig) -> Iterator[str]:
    """Yield what is wrong with the choice of layers, modules or kinds of parameters that train, one line each."""
    choices = (tuning.layers, tuning.modules, tuning.embeddings, tuning.bias_only, tuning.norm_only)
    if not any(choices):
        yield (
            "tuning=freeze: nothing is chosen to train; set tuning.layers=last-2, or one of tuning.modules, "
            "tuning.embeddings, tuning.bias_only and tuning.norm_only"
        )
    if tuning.layers is not None and not LAYER_RANGE_REGEX.fullmatch(tuning.layers):
        yield f"tuning.layers={tuning.layers}: must be last-<n> or <first>-<last>, such as last-2 or 4-7"
    if tuning.modules is not None:
        yield from _regex_problems("tuning.modules", tuning.modules, r"such as .*\.mlp for all feed-forward parts")


def _lora_problems(tuning: LoraConfig) -> Iterator[str]:
    """Yield what is wrong with LoRA's initial values, its adapters of experts, and ranks and alphas by module, one line each.

    `tuning.rank_pattern` and `tuning.alpha_pattern` hold a number by regular expression, such as `{"q_proj": 16}`.
    """
    if not INIT_REGEX.fullmatch(tuning.init):
        valid_examples = ["default", "gaussian", "pissa", "pissa_niter_4", "olora"]
        close_matches = difflib.get_close_matches(tuning.init, valid_examples, n=1)
        hint = f"; did you mean {close_matches[0]}?" if close_matches else ""
        yield f"tuning.init={tuning.init}: must be default, gaussian, pissa, pissa_niter_<n> or olora{hint}"
    elif rewrites_base(tuning.init) and tuning.dora:
        yield (
            f"tuning.init={tuning.init} with tuning.dora=true: the export could not be turned back into an adapter of the "
            "unchanged base; use tuning.init=default, or tuning.dora=false"
        )
    if tuning.experts or tuning.router:
        yield from _expert_problems(tuning)
    for module_regex, rank in tuning.rank_pattern.items():
        key = f"tuning.rank_pattern.{module_regex}"
        yield from _regex_problems(key, module_regex, "name a module, such as q_proj")
        if not rank >= 1:  # true for NaN too, unlike `rank < 1`
            yield f"{key}={rank:g}: must be at least 1; leave the module out for tuning.rank"
    for module_regex, alpha in tuning.alpha_pattern.items():
        key = f"tuning.alpha_pattern.{module_regex}"
        yield from _regex_problems(key, module_regex, "name a module, such as q_proj")
        if not alpha > 0:  # true for NaN too
            yield f"{key}={alpha:g}: must be above 0; leave the module out for tuning.alpha"


def _expert_problems(tuning: LoraConfig) -> Iterator[str]:
    """Yield which settings LoRA on experts or routers cannot be combined with, one line each.

    Their weights are parameters of a larger module, not layers of their own, which dropout, DoRA and some initial values need.
    """
    setting = "tuning.experts=true" if tuning.experts else "tuning.router=true"
    if tuning.dropout:
        yield (
            f"{setting} with tuning.dropout={tuning.dropout:g}: an update that is part of the weights has no input of its own to "
            "drop from, and peft refuses it; set tuning.dropout=0"
        )
    if tuning.dora:
        yield f"{setting} with tuning.dora=true: peft has no DoRA for parameters without a layer of their own; set it false"
    if rewrites_base(tuning.init):
        yield (
            f"{setting} with tuning.init={tuning.init}: peft splits only the weights of layers; use tuning.init=default or "
            "gaussian"
        )


def _adalora_problems(tuning: AdaLoraConfig) -> Iterator[str]:
    """Yield what is wrong with AdaLoRA's ranks, or the shares of the run before and after ranks are pruned, one line each."""
    if tuning.target_rank >= tuning.init_rank:
        yield (
            f"tuning.target_rank={tuning.target_rank}: must be below tuning.init_rank={tuning.init_rank}, from which ranks "
            f"are taken; set tuning.init_rank={max(2, tuning.target_rank * 3 // 2)}, or use tuning=lora for a fixed rank"
        )
    if tuning.initial_share + tuning.final_share >= 1:
        yield (
            f"tuning.final_share={tuning.final_share:g}: with tuning.initial_share={tuning.initial_share:g} no step is left "
            "to take ranks in; lower one of them so that their sum is below 1"
        )


def _ia3_problems(tuning: Ia3Config) -> Iterator[str]:
    """What is wrong with the feed-forward modules, which must be among the targets."""
    if tuning.feedforward and tuning.targets == "auto":
        yield f"tuning.feedforward={tuning.feedforward}: auto chooses both; list tuning.targets too, or leave both out"
    elif isinstance(tuning.targets, list) and (extra := sorted(set(tuning.feedforward) - set(tuning.targets))):
        yield f"tuning.feedforward={extra}: must be among tuning.targets={tuning.targets}; add them there"


def _peft_problems(tuning: PeftConfig) -> Iterator[str]:
    """Yield what is wrong with `tuning.type`, a method of peft, or with its `tuning.options`, one line each.

    The first case that holds:

    - not set; a method that is a choice of `tuning` itself; one that cannot work; one that is not in `PEFT_METHODS`.
    - else: problems of its options, for which peft is imported.
    """
    peft_type = tuning.type
    proven = ", ".join(PEFT_METHODS)
    if peft_type is None:
        yield f"tuning.type: not set; name a method of peft, one of {proven}"
    elif peft_type in TUNING_METHODS or peft_type in CHOICE_BY_PEFT_NAME:
        choice = CHOICE_BY_PEFT_NAME.get(peft_type, peft_type)
        yield f"tuning.type={peft_type}: has settings of its own here; use tuning={choice}"
    elif peft_type in UNSUPPORTED_TYPES:
        yield f"tuning.type={peft_type}: {UNSUPPORTED_TYPES[peft_type]}; use one of {proven}, or another tuning="
    elif peft_type not in PEFT_METHODS:
        close_matches = difflib.get_close_matches(peft_type, PEFT_METHODS, n=1)
        hint = f"did you mean {close_matches[0]}?" if close_matches else f"use one of {proven}"
        yield f"tuning.type={peft_type}: not proven to train alike under every strategy; {hint}"
    else:
        # The only settings that composing asks peft about; importing it takes seconds.
        from trainer.tuning.peft_configs import option_problems

        yield from option_problems(peft_type, tuning.options)

"""What works with what: tuning method x strategy x feature x optimizer, one verdict a cell, out of data in three places.

`trainer/tuning/table.py` has the methods, `trainer/optim/support.py` the optimizers, and this module the features and what
a device must have. The same verdicts refuse a run when it is composed, choose what the parity tests run
(`tests/parity/plan.py`), and make the tables of `docs/methods.md`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from strategies.base import ActivationCheckpointing, StrategyConfig, StrategyName
from strategies.registry import STRATEGIES
from trainer.config.parallel import (
    EXPERT_PARALLEL_REMEDY,
    NO_EXPERT_PARALLELISM_SETTING,
    NO_EXPERTS_REASON_BY_STRATEGY,
    NO_MATRIX_OPTIMIZER_REASON,
    NO_SEQUENCE_PARALLELISM_REMEDY,
    ONE_PROCESS_REASON,
)
from trainer.optim.config import OptimConfig, OptimName
from trainer.optim.support import OPTIMIZER_SUPPORT, Needs
from trainer.tuning.base import TuningConfig
from trainer.tuning.config import PeftConfig
from trainer.tuning.table import PEFT_METHODS, SHARDED, TUNING_METHODS, TuningMethod


class CombinationState(StrEnum):
    """What is known of a combination of method, strategy, feature and optimizer."""

    tested = "tested"
    refused = "refused"
    gpu_only = "GPU only"


@dataclass(frozen=True, slots=True)
class Feature:
    """Something a run may have beside a method, a strategy and an optimizer."""

    title: str
    settings: str
    """What switches it on."""
    property_name: str = ""
    """The key in `Method.refusal_by_property` that says why a method refuses this feature; empty if no method can refuse it."""
    instead: str = ""
    """What to choose instead if a method refuses it."""
    only_under_strategies: tuple[str, ...] = ()
    """Strategies under which a method's refusal counts; empty: all."""


FEATURES: dict[str, Feature] = {
    "plain": Feature("nothing else", ""),
    "checkpointing": Feature(
        "full activation checkpointing",
        "strategy.activation_checkpointing=full",
        "checkpointing",
        "strategy.activation_checkpointing=none",
    ),
    "selective": Feature(
        "selective activation checkpointing",
        "strategy.activation_checkpointing=selective",
        "selective",
        "full or none",
    ),
    "padding_free": Feature("rows without padding", "data.layout=padding_free", "padding_free", "data.layout=padded"),
    "padded": Feature("padded rows", "data.layout=padded"),
    "packing": Feature("packing", "data.packing=true", "padding_free", "data.packing=false"),
    "bf16": Feature("bf16", "precision=bf16", "half", "fp32 or strategy=ddp", SHARDED),
    "fp16": Feature("fp16", "precision=fp16", "half", "fp32 or strategy=ddp", SHARDED),
    "quantised": Feature("a quantised base model", "model.quantisation=nf4", "quantised", "model.quantisation=none"),
    "sequence": Feature(
        "rows shared by several ranks (sequence parallelism)", "parallel.sequence=2", "sequence", "parallel.sequence=1"
    ),
    "experts": Feature(
        "experts distributed over ranks (expert parallelism)",
        "parallel.experts=2",
        "experts",
        NO_EXPERT_PARALLELISM_SETTING,
    ),
    "compile": Feature("torch.compile", "strategy.compile=true", instead="strategy.compile=false"),
    "rounds": Feature("reinforcement learning, on answers that the model generates", "objective=grpo"),
}
"""Every feature by its name in tests and tables. Several features may have one property: bf16 and fp16 are both `half`."""

METHODS_THAT_COMPILE = ("full", "freeze", "lora")
"""Methods that were run compiled and took the same steps."""
NOT_COMPILED_REASON = "it is not tested to compute the same training steps when compiled"
STRATEGY_ADVICE = "strategy=ddp, or tuning=lora"
"""What to choose instead if a method refuses a strategy."""


@dataclass(frozen=True, slots=True)
class CombinationVerdict:
    """The verdict on one combination of method, strategy, feature and optimizer."""

    state: CombinationState
    reason: str = ""
    """Why it is refused, or cannot run on a CPU."""
    instead: str = ""
    """What to choose instead if the combination is refused."""


def methods_by_name() -> dict[str, TuningMethod]:
    """All tuning methods by the name that users type: that of `tuning=`, such as `lora`, or of `tuning.type` with tuning=peft."""
    return {**TUNING_METHODS, **PEFT_METHODS}


def method_name_of(config: TuningConfig) -> str:
    """The name of the method that has these settings, as in `methods_by_name`: under tuning=peft its type."""
    return str(config.type) if isinstance(config, PeftConfig) else str(config.name)


def combination_verdict(
    method_name: str, strategy: StrategyName, feature: str = "plain", optim: OptimName = OptimName.adamw
) -> CombinationVerdict:
    """Whether a tuning method works under a strategy with a feature and an optimizer, for the tables of the documentation.

    Refused, with the reason and what to use instead; testable on GPUs only; or tested. `method_name`: a tuning method, such
    as "lora". `feature`: a key of `FEATURES`, such as "packing". The first reason for a refusal counts:
    - the method does not run under the strategy, or the optimizer does not
    - the method refuses the feature, or the feature by itself does not go with strategy, optimizer or method
    - the method refuses the optimizer
    """
    method = methods_by_name()[method_name]
    asked_feature = FEATURES[feature]
    support = OPTIMIZER_SUPPORT[optim]
    # The method or the optimizer under the strategy.
    reason = method.refusal_by_strategy.get(str(strategy))
    if reason:
        return CombinationVerdict(CombinationState.refused, reason=reason, instead=STRATEGY_ADVICE)
    if strategy in support.refusal_by_strategy:
        return CombinationVerdict(
            CombinationState.refused,
            reason=support.refusal_by_strategy[strategy],
            instead=f"{support.strategy_instead}, or optim=adamw",
        )
    # The method with the feature, then the feature by itself.
    reason = method.refusal_by_property.get(asked_feature.property_name)
    only_under = asked_feature.only_under_strategies
    concerns_strategy = not only_under or strategy in only_under
    if reason and concerns_strategy:
        return CombinationVerdict(CombinationState.refused, reason=reason, instead=asked_feature.instead)
    feature_refusal = _refusal_of_feature(method_name, strategy, feature, optim)
    if feature_refusal is not None:
        return feature_refusal
    reason = method.refusal_by_optimizer.get(str(optim))
    if reason:
        return CombinationVerdict(CombinationState.refused, reason=reason, instead="optim=adamw")
    if feature == "fp16":
        return CombinationVerdict(CombinationState.gpu_only, reason="not supported on CPUs")
    return CombinationVerdict(CombinationState.tested)


def _refusal_of_feature(
    method_name: str, strategy: StrategyName, feature: str, optim: OptimName
) -> CombinationVerdict | None:
    """Refuse a feature that by itself does not go with the strategy, the optimizer or the method; None if it does.

    What single methods refuse stands in their own tables; these rules hold for several. `method_name`: a tuning method, such
    as "lora". `feature`: a key of `FEATURES`.
    """
    refused = CombinationState.refused
    if feature == "sequence" and strategy is StrategyName.single:
        return CombinationVerdict(refused, ONE_PROCESS_REASON, instead=NO_SEQUENCE_PARALLELISM_REMEDY)
    if feature == "experts" and strategy in NO_EXPERTS_REASON_BY_STRATEGY:
        return CombinationVerdict(refused, NO_EXPERTS_REASON_BY_STRATEGY[strategy], instead=EXPERT_PARALLEL_REMEDY)
    if feature == "experts" and OPTIMIZER_SUPPORT[optim].needs is Needs.whole_matrices:  # such as Muon
        return CombinationVerdict(refused, NO_MATRIX_OPTIMIZER_REASON, instead="optim=adamw")
    if feature == "compile" and method_name not in METHODS_THAT_COMPILE:
        return CombinationVerdict(refused, NOT_COMPILED_REASON, instead=FEATURES["compile"].instead)
    return None


def combination_problems(tuning: TuningConfig, strategy: StrategyConfig, optim: OptimConfig) -> Iterator[str]:
    """Check a run's tuning method against its strategy, compiled blocks, full activation checkpointing, and its optimizer.

    Yields an error message for each that the method refuses: `key=value: reason; what to do`. Other refusals, such as that of
    a quantised base, are reported where those settings are checked.
    """
    method_name = method_name_of(tuning)
    if method_name not in methods_by_name():  # a method of peft of which no table is kept
        return
    method = methods_by_name()[method_name]
    tuning_text = f"tuning.type={method_name}" if method_name in PEFT_METHODS else f"tuning={method_name}"
    reason = method.refusal_by_strategy.get(str(strategy.name))
    if reason:
        yield f"strategy={strategy.name} with {tuning_text}: {reason}; use {STRATEGY_ADVICE}"
    if strategy.compile and method_name not in METHODS_THAT_COMPILE:
        proven = " or ".join(f"tuning={name}" for name in METHODS_THAT_COMPILE)
        instead = FEATURES["compile"].instead
        yield f"strategy.compile=true with {tuning_text}: {NOT_COMPILED_REASON}; set {instead}, or use {proven}"
    reason = method.refusal_by_property.get("checkpointing")
    if strategy.activation_checkpointing is ActivationCheckpointing.full and reason:
        instead = FEATURES["checkpointing"].instead
        yield f"strategy.activation_checkpointing=full with {tuning_text}: {reason}; set {instead}"
    reason = method.refusal_by_optimizer.get(str(optim.name))
    if reason:
        yield f"optim={optim.name} with {tuning_text}: {reason}; use optim=adamw"


def states_under_strategies_text(
    method_name: str, *, feature: str = "plain", optim: OptimName = OptimName.adamw
) -> str:
    """Write a cell of the tables in docs/methods.md: under which strategies a method works with a feature and an optimizer.

    `tested`, `refused` or `GPU only` if that holds under all strategies that run the optimizer; else those under which it is
    not tested, such as "refused under `ddp`, `zero3`". `feature`: a key of `FEATURES`. With a feature or another optimizer than
    AdamW, strategies that do not run the method at all are left out, since another cell says so.
    """
    names = [name for name in STRATEGIES if name not in OPTIMIZER_SUPPORT[optim].refusal_by_strategy]
    if feature != "plain" or optim is not OptimName.adamw:
        names = [name for name in names if str(name) not in methods_by_name()[method_name].refusal_by_strategy]
    state_by_strategy = {name: combination_verdict(method_name, name, feature, optim).state for name in names}
    states = set(state_by_strategy.values())
    if len(states) == 1:
        return str(states.pop())
    phrases = []
    for state in (CombinationState.gpu_only, CombinationState.refused):
        strategies = [f"`{name}`" for name in names if state_by_strategy[name] is state]
        if strategies:
            phrases.append(f"{state} under {', '.join(strategies)}")
    return "; ".join(phrases)

"""The usual learning rates: what `optim.lr` is if it is not set, by optimizer, tuning method and objective.

The tables below are the only place that knows a rate. docs/peft.md and docs/optimizers.md are made from them. A rate has a
source: a paper, peft's comparison of methods, or a measurement of ours on the demo's model. Where there is none of these, the
rate is a multiple of a known one, and its source says so. What is in no table must be given by the user.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from trainer.optim.config import MuonConfig, MuonScale, OptimConfig, OptimName

PEFT_COMPARISON_SOURCE = "peft's method comparison with Llama 3.2 3B"
"""github.com/huggingface/peft, method_comparison/MetaMathQA at 5d602fd: 5,000 steps of mathematics, test accuracy by rate."""
DEMO_SOURCE = "measured with SmolLM2-135M"
"""benchmarks/results/methods/compare.md: the held-out loss fell at this rate."""


@dataclass(frozen=True, slots=True)
class UsualRate:
    """A learning rate to start from, and the rates that are advised besides."""

    usual: float
    low: float
    high: float
    """The highest rate that is advised, for models of less than about a billion parameters."""
    source: str

    def times(self, factor: float, source: str) -> UsualRate:
        """The rate of another objective or optimizer, as a multiple of this one; two digits are kept."""
        usual, low, high = (float(f"{rate * factor:.2g}") for rate in (self.usual, self.low, self.high))
        return UsualRate(usual, low, high, source)


_FULL_RATE = UsualRate(2e-5, 1e-5, 1e-4, "Touvron et al. 2023, arXiv:2307.09288")
_LORA_RATE = UsualRate(2e-4, 1e-4, 3e-3, "Dettmers et al. 2023, arXiv:2305.14314")
RATE_BY_METHOD: dict[str, UsualRate] = {
    "full": _FULL_RATE,
    "freeze": replace(_FULL_RATE, source="the rate of full tuning"),
    "lora": _LORA_RATE,
    "adalora": UsualRate(5e-4, 2e-4, 3e-3, "Zhang et al. 2023, arXiv:2303.10512"),
    "loha": replace(_LORA_RATE, source="the rate of LoRA, a similar method; not measured"),
    "lokr": UsualRate(3e-3, 5e-4, 6e-3, PEFT_COMPARISON_SOURCE),
    "oft": UsualRate(1e-4, 1e-4, 1e-3, PEFT_COMPARISON_SOURCE),
    "boft": UsualRate(1e-4, 1e-4, 1e-3, "the rate of OFT, a similar method; not measured"),
    "vera": UsualRate(1e-3, 1e-3, 2e-2, PEFT_COMPARISON_SOURCE),
    "ia3": UsualRate(5e-3, 1e-3, 1e-2, PEFT_COMPARISON_SOURCE),
    "ln": UsualRate(1e-3, 5e-4, 1e-2, "five times the rate of LoRA; not measured"),
    "bottleneck": UsualRate(1e-3, 1e-4, 3e-3, DEMO_SOURCE),
    "prefix": UsualRate(5e-3, 1e-3, 1e-2, PEFT_COMPARISON_SOURCE),
    "prompt": UsualRate(1e-2, 1e-3, 1e-1, DEMO_SOURCE),
    "p_tuning": UsualRate(1e-4, 1e-4, 3e-3, PEFT_COMPARISON_SOURCE),
    "adaption_prompt": UsualRate(5e-3, 5e-3, 1.5e-2, PEFT_COMPARISON_SOURCE),
    "c3a": UsualRate(0.3, 0.1, 0.3, PEFT_COMPARISON_SOURCE),
    "glora": UsualRate(1e-4, 1e-4, 5e-4, PEFT_COMPARISON_SOURCE),
    "gralora": UsualRate(2e-4, 1e-4, 1e-3, PEFT_COMPARISON_SOURCE),
    "hira": UsualRate(4.5e-3, 1e-3, 4.5e-3, PEFT_COMPARISON_SOURCE),
    "miss": UsualRate(1e-4, 1e-4, 1e-3, PEFT_COMPARISON_SOURCE),
    "peanut": UsualRate(1e-4, 1e-4, 1e-3, PEFT_COMPARISON_SOURCE),
    "road": UsualRate(1e-3, 1e-3, 5e-3, PEFT_COMPARISON_SOURCE),
}
"""AdamW, for objectives that imitate text (`IMITATING_OBJECTIVES`). A method of `tuning=peft` stands under its `tuning.type`."""


@dataclass(frozen=True, slots=True)
class ObjectiveRates:
    """AdamW's rates for an objective that does more than imitate text. Other adapters differ from it as LoRA does."""

    full: UsualRate
    lora: UsualRate


IMITATING_OBJECTIVES = ("sft", "pretrain", "distillation")
_PREFERENCES = ObjectiveRates(
    full=UsualRate(1e-6, 5e-7, 5e-6, "the default of TRL for DPO"),
    lora=UsualRate(2e-5, 5e-6, 5e-5, "a tenth of the rate for sft; not measured"),
)
_REINFORCEMENT = ObjectiveRates(
    full=UsualRate(1e-6, 3e-7, 5e-6, "Shao et al. 2024, arXiv:2402.03300"),
    lora=UsualRate(1e-5, 1e-5, 3e-4, "ten times the rate of full tuning; not measured"),
)
RATES_BY_OBJECTIVE: dict[str, ObjectiveRates] = {
    "classification": ObjectiveRates(
        full=UsualRate(3e-5, 1e-5, 2e-4, "Devlin et al. 2018, arXiv:1810.04805"), lora=_LORA_RATE
    ),
    "seq2seq": ObjectiveRates(full=UsualRate(1e-4, 3e-5, 3e-4, "transformers' page on T5"), lora=_LORA_RATE),
    "dpo": _PREFERENCES,
    "simpo": _PREFERENCES,
    "kto": _PREFERENCES,
    "orpo": ObjectiveRates(
        full=UsualRate(8e-6, 5e-6, 2e-5, "Hong et al. 2024, arXiv:2403.07691"),
        lora=UsualRate(1e-4, 2e-5, 2e-4, "about ten times the rate of full tuning; not measured"),
    ),
    "reward": ObjectiveRates(
        full=UsualRate(9e-6, 5e-6, 2e-5, "Ouyang et al. 2022, arXiv:2203.02155"),
        lora=UsualRate(1e-4, 2e-5, 2e-4, "ten times the rate of full tuning; not measured"),
    ),
    **dict.fromkeys(("grpo", "dr_grpo", "dapo", "gspo", "rloo", "reinforce_pp", "cispo", "max_rl"), _REINFORCEMENT),
}

FACTOR_OF_ADAMW_RATE: dict[OptimName, tuple[float, str]] = {
    OptimName.adamw: (1, ""),
    OptimName.adamw_8bit: (1, "AdamW's rate"),
    OptimName.schedule_free: (1, "AdamW's rate"),
    OptimName.muon: (1, "AdamW's rate: Liu et al. 2025, arXiv:2502.16982"),
    OptimName.lion: (0.15, "0.15 times AdamW's: Chen et al. 2023, arXiv:2302.06675"),
}
"""Optimizers whose rates are a multiple of AdamW's, whatever the method and the objective: the factor, and its source."""
RATE_BY_OPTIMIZER_AND_METHOD: dict[tuple[OptimName, str], UsualRate] = {
    (OptimName.adafactor, "full"): UsualRate(1e-3, 3e-4, 1e-2, "Raffel et al. 2019, arXiv:1910.10683"),
    (OptimName.adafactor, "lora"): UsualRate(
        5e-2, 1e-2, 1e-1, "50 times the rate of full tuning: matrix B starts at zero; not measured"
    ),
    (OptimName.sgd, "full"): UsualRate(1e-2, 1e-3, 1e-1, "500 times the rate of AdamW; not measured"),
}
"""Optimizers whose rates are no multiple of AdamW's, by method. For the objectives of `IMITATING_OBJECTIVES`, and seq2seq."""


def usual_learning_rate(optim: OptimConfig, method: str, objective: str) -> UsualRate | None:
    """Look up what `optim.lr` is if the user does not set it: for an optimizer, a tuning method and an objective.

    `method`: such as `lora`. `objective`: such as `sft`.
    - Muon with its original scale: None.
    - an optimizer whose rates are no multiple of AdamW's: its own table, for imitation and seq2seq; else None.
    - else: AdamW's rate, times the optimizer's factor; None if no table has AdamW's.
    """
    if isinstance(optim, MuonConfig) and optim.scale is MuonScale.original:
        return None  # its updates are of another size, and nobody has given a rate for fine-tuning
    if optim.name not in FACTOR_OF_ADAMW_RATE:
        if objective not in (*IMITATING_OBJECTIVES, "seq2seq"):  # the papers trained by imitation alone
            return None
        return RATE_BY_OPTIMIZER_AND_METHOD.get((optim.name, method))
    rate = _adamw_rate(method, objective)
    factor, source = FACTOR_OF_ADAMW_RATE[optim.name]
    if rate is None or factor == 1:
        return rate
    return rate.times(factor, source)


def _adamw_rate(method: str, objective: str) -> UsualRate | None:
    """Look up AdamW's usual learning rate for a tuning method and an objective; None if no table has one of them.

    Objectives of `IMITATING_OBJECTIVES` have the method's rate. Others have rates of their own for full tuning and LoRA; for
    further methods the method's rate is scaled as LoRA's is.
    """
    rate = RATE_BY_METHOD.get(method)
    if rate is None or objective in IMITATING_OBJECTIVES:
        return rate
    rates = RATES_BY_OBJECTIVE.get(objective)
    if rates is None:
        return None
    if method in ("full", "freeze"):
        return rates.full
    if method == "lora":
        return rates.lora
    factor = rates.lora.usual / _LORA_RATE.usual
    return rate if factor == 1 else rate.times(factor, f"{factor:g} times the rate for sft, as with LoRA; not measured")


def missing_rate_message(optim: OptimConfig, method: str, objective: str) -> str:
    """Write the message for a run that sets no `optim.lr` and for which no table has a usual rate.

    It names the rates of similar runs. Similar runs have this run's optimizer with LoRA or full tuning, the default optimizer
    with this run's method, or the default optimizer with LoRA, in this order.
    """
    default_optim = OptimConfig()
    similar_runs = [(optim, "lora"), (optim, "full"), (default_optim, method), (default_optim, "lora")]
    rate_by_run: dict[str, float] = {}  # such as {"optim=adamw and lora": 0.0002}; a run may be in the list twice
    for similar_optim, similar_method in similar_runs:
        rate = usual_learning_rate(similar_optim, similar_method, objective)
        if rate is not None:
            rate_by_run[f"optim={similar_optim.name} and {similar_method}"] = rate.usual
    rate_texts = [f"{usual:g} with {run}" for run, usual in rate_by_run.items()]
    rates_of_similar_runs = f"; usual rates nearby: {', '.join(rate_texts)}" if rate_texts else ""
    return (
        f"optim.lr: not set, and no usual rate is known for optim={optim.name}, {method} and objective={objective}; give "
        f"one, as in optim.lr=1e-4{rates_of_similar_runs}"
    )

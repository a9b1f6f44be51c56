"""Steps of online learning: the texts, the gradients and the metrics of one process, under every strategy."""

import itertools

import pytest

from strategies.base import StrategyName
from tests.helpers.covering import chosen, takes, values
from tests.parity.plan import CASES
from tests.parity.rounds import FEATURES, STEPS, VARIANTS
from trainer.config.combinations import CombinationState, combination_verdict, method_name_of

TOLERANCE = 1e-5
STRATEGIES = ("ddp", "fsdp2", "hsdp", "zero1", "zero2", "zero3")
MATRIX = [
    *itertools.product(VARIANTS, ("full", "lora"), STRATEGIES, ("plain", "accumulation", "several")),
    *itertools.product(("grpo near its start",), ("lora",), ("ddp", "fsdp2", "zero3"), ("nf4",)),
    *itertools.product(VARIANTS, ("full", "lora"), ("fsdp2", "zero2", "zero3"), ("shared rows",)),
    *itertools.product(VARIANTS, ("full", "lora"), ("fsdp2",), ("distributed experts",)),
]


def is_legal(case) -> bool:
    _, _, strategy, feature = case
    return feature in FEATURES and not (strategy == "hsdp" and feature == "shared rows")


def met(case):
    """Each value of each axis, and with a divergence both kinds of reference, whole and in pieces."""
    variant, tuning, strategy, feature = case
    marks = values(case)
    if "start" in variant:
        marks |= {("reference", tuning, strategy == "ddp"), ("reference", feature)}
    # Ratios of whole answers, and the divergence of whole answers, are sums over the ranks that share a row.
    if variant in ("grpo by answer", "grpo of the round"):
        marks |= {("whole answers", variant, feature == "shared rows")}
    return marks


def failures(compared) -> list[str]:
    """What of the steps is not that of `single`."""
    found = []
    for number, step in enumerate(compared, start=1):
        own, right = step["found"], step["expected"]
        if own["texts"] != right["texts"]:
            return [*found, f"step {number}: other answers"]
        for name, value in right["values"].items():
            bound = TOLERANCE * (right["size"] if name == "loss" else abs(value)) + 1e-9
            if abs(own["values"][name] - value) > bound and "sampling" not in name:
                found.append(f"step {number}: {name} {own['values'][name]} instead of {value}")
        for kind, (difference, largest, rounding) in step["kinds"].items():
            if difference > TOLERANCE * largest + rounding:
                found.append(f"step {number}: gradient of {kind} differs by {difference:.2e} of {largest:.2e}")
    return found


@pytest.mark.parametrize(
    ("variant", "tuning", "strategy", "feature"), chosen([case for case in MATRIX if is_legal(case)], met, takes)
)
def test_rounds_are_those_of_one_process(ranks, variant, tuning, strategy, feature):
    world = 4 if strategy == "hsdp" else 2
    compared = ranks[world].ask("rounds", "compare", variant, tuning, strategy, feature)
    assert len(compared) == STEPS
    assert failures(compared) == []
    norms = [step["expected"]["values"]["grad_norm"] for step in compared]
    assert min(norms) > 1e-3, "nothing was learned, so nothing was compared"
    for step in compared:
        differences = step["expected"]["values"]["sampling/sampling_logp_difference/mean"]
        assert feature == "several" or differences < 1e-4
    if variant in ("grpo near its start", "grpo of the round"):
        divergences = [step["expected"]["values"]["kl"] for step in compared]
        assert abs(divergences[0]) < 1e-6 < divergences[-1]


METHODS = [
    (case, strategy)
    for case, strategy in itertools.product(CASES, STRATEGIES)
    if combination_verdict(method_name_of(CASES[case]), StrategyName(strategy), "rounds").state
    is CombinationState.tested
]


def kinds_of_method(case):
    """What of a method writing and learning meet: its parameters, and whether its base can be switched to."""
    name, strategy = case
    kinds = {"virtual": ("prefix", "prompt", "p_tuning", "adaption"), "own": ("bottleneck", "freeze")}
    kind = next((kind for kind, names in kinds.items() if name.startswith(names)), "peft")
    return {(kind, strategy.startswith("zero")), strategy == "zero3"}


@pytest.mark.parametrize(("case", "strategy"), chosen(METHODS, kinds_of_method, takes))
def test_every_method_writes_and_learns_as_in_one_process(ranks, case, strategy):
    world = 4 if strategy == "hsdp" else 2
    compared = ranks[world].ask("rounds", "compare", "grpo near its start", case, strategy, "plain")
    # Some methods move far at this rate, and rounding with them: the second step shows the update, the third would amplify.
    assert failures(compared[:2]) == []
    assert abs(compared[0]["expected"]["values"]["kl"]) <= 1e-8 < compared[1]["expected"]["values"]["kl"]


def test_one_groups_advantages_doubled_on_one_rank_are_seen(ask):
    compared = ask("rounds", "compare", "grpo", "full", "fsdp2", "plain", True)
    assert any("gradient of" in failure for failure in failures(compared[:1]))
    assert any("grad_norm" in failure for failure in failures(compared[:1]))

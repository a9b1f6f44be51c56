"""Ranks over which experts are distributed take the steps of one process, which has all of them."""

import itertools

import pytest

from tests.helpers.covering import chosen, takes, whole
from tests.parity.dealt import FAULTS, RESUMED, TUNINGS, Case
from tests.parity.test_matrix_sequences import OBJECTIVES, assert_close
from tests.parity.test_methods import BF16

EXACT = 1e-5
ARCHITECTURES = ("qwen3_moe", "mixtral", "gpt_oss")
STRATEGIES = ("fsdp2", "hsdp")
FEATURES = (
    *("full", "selective", "auto", "accumulation", "no wait", "chunks", "chunks selective", "host"),
    *("packing", "ema", "routers", "routers at once"),
)
ALL_CASES = [
    *itertools.product(OBJECTIVES, ("full", "lora on experts"), ("qwen3_moe",), STRATEGIES, (2, 4), (1, 2), ("plain",)),
    *itertools.product(("sft",), TUNINGS, ARCHITECTURES, STRATEGIES, (2, 4), (1, 2), ("plain",)),
    *itertools.product(("sft",), ("full", "lora on experts"), ("mixtral",), STRATEGIES, (2, 4), (1, 2), FEATURES),
    *itertools.product(("dpo",), ("full",), ("gpt_oss",), ("fsdp2",), (2, 4), (1,), FEATURES[:8]),
    *itertools.product(
        ("sft", "dpo"), ("lora", "lora on experts"), ARCHITECTURES[::2], STRATEGIES, (2, 4), (1,), ("nf4",)
    ),
    *itertools.product(("sft",), ("lora",), ARCHITECTURES[:1], STRATEGIES, (2, 4), (1,), ("fp4", "int8")),
    *itertools.product(
        ("distil",), ("full", "lora"), ARCHITECTURES[:1], STRATEGIES, (2, 4), (1,), ("mixture teacher",)
    ),
]
MATRIX = [case for case in dict.fromkeys(ALL_CASES) if not (case[3] == "hsdp" and case[4] == 4)]
"""Under hsdp two ranks form a replica, over which four cannot be dealt."""


def met(case):
    """What `make test` runs: each value of each axis, and either degree with rows that are shared and with rows that are not."""
    case = Case(*case)
    # An objective is the same for every layer below it: one of tokens and one of pairs.
    pairs = ("dpo", "ipo", "hinge", "simpo", "orpo", "kto")
    kind = {
        **dict.fromkeys(("full", "auto"), "selective"),
        **dict.fromkeys(("accumulation", "no wait"), "packing"),  # which has several micro-batches a step, too
        **dict.fromkeys(("ema", "host", "mixture teacher"), "plain"),
        **dict.fromkeys(("fp4", "int8"), "nf4"),
        "routers at once": "routers",
        "chunks selective": "chunks",
    }
    return {
        case.objective in pairs,
        case.tuning,
        case.architecture,
        case.strategy,
        ("feature", kind.get(case.feature, case.feature)),
        (case.experts, case.sequence),
    }


@pytest.mark.parametrize("case", chosen(MATRIX, met, takes), ids=lambda case: " ".join(map(str, case)))
def test_dealt_experts_train_as_one_process_does(ranks, case):
    if {"nf4", "fp4", "int8"} & set(case):
        pytest.importorskip("bitsandbytes")
    curves = ranks[4].ask("dealt", "compare", *case)
    assert_close(curves["found"], curves["expected"])
    if "ema" in case:
        assert curves["average apart"] < 1e-6 < 1e-4 < curves["average lag"]


@pytest.fixture(scope="module")
def eight_ranks(ranks):
    """They hold half a GiB each, and nobody else asks them."""
    yield ranks[8]
    ranks[8].stop()


@whole(
    "simulated steps reduce as many bytes in the same groups, which tests/planner/test_communication_volume.py counts"
)
@pytest.mark.parametrize(
    ("tuning", "degree", "sequence", "feature"),
    [
        ("full", 2, 1, "plain"),
        ("full", 4, 1, "plain"),
        ("lora on experts", 2, 1, "plain"),
        ("full", 2, 1, "no wait"),
        ("full", 2, 2, "accumulation"),
    ],
)
def test_replicas_whose_experts_several_ranks_hold_train_as_one_process_does(
    eight_ranks, tuning, degree, sequence, feature
):
    """Two replicas of four ranks: gradients of an expert are reduced within a replica, and then between the two.

    With experts over two ranks, two ranks of a replica shard the same experts; over four, one rank holds them alone.
    """
    curves = eight_ranks.ask("dealt", "compare", "sft", tuning, "qwen3_moe", "hsdp", degree, sequence, feature)
    assert_close(curves["found"], curves["expected"])


@whole("the same steps, with the roundings of bf16")
def test_dealt_experts_in_bf16_stay_as_near_as_other_strategies(ranks):
    curves = ranks[4].ask("dealt", "compare", "sft", "full", "qwen3_moe", "fsdp2", 2, 1, "bf16")
    for (loss, norm), (right_loss, right_norm) in zip(curves["found"], curves["expected"], strict=True):
        assert loss == pytest.approx(right_loss, rel=BF16)
        assert norm == pytest.approx(right_norm, rel=BF16)
    assert curves["found"] != curves["expected"]


@pytest.mark.parametrize("fault", list(FAULTS))
def test_planted_fault_in_dealt_experts_shows(ranks, fault):
    """A comparison that one of the faults passes would prove nothing."""
    curves = ranks[4].ask("dealt", "planted", fault)
    with pytest.raises(AssertionError):
        assert_close(curves["found"], curves["expected"])


@pytest.mark.parametrize("degree", (pytest.param(2, marks=whole("a place has several ranks there")), 4))
def test_one_rank_may_get_all_tokens_and_the_others_none(ranks, degree):
    run = ranks[4].ask("dealt", "crowded", degree)
    assert_close(run["found"], run["expected"])
    places = [rank % degree for rank in range(4)]
    for place, received in zip(places, run["received"], strict=True):
        assert (received > 0) == (place == 0)


@pytest.mark.parametrize(
    "tuning", ("full", pytest.param("lora on experts", marks=whole("fewer parameters are distributed")))
)
def test_run_resumes_with_experts_dealt_over_another_number_of_ranks(ranks, tuning):
    run = ranks[4].ask("dealt", "resumed", tuning)
    assert run["apart"] == 0.0, "what is gathered, and so exported, is not what one process has"
    assert len(run["found"]) == len(run["expected"]) == 2 * len(RESUMED[tuning])
    for found, expected in zip(run["found"], run["expected"], strict=True):
        assert found == pytest.approx(expected, rel=EXACT)


@whole("simulated steps exchange as many bytes, which tests/simulated/test_dealt_experts.py counts")
@pytest.mark.parametrize("feature", ("plain", "full"))
def test_bytes_of_experts_that_are_gathered_go_down_with_the_degree(ranks, feature):
    """Of an adapter's run, which gathers experts twice a step. With a rank to each place, nothing is left to gather."""
    sizes = ranks[4].ask("dealt", "gathered_bytes", feature)
    assert sizes["1"] - sizes["4"] == 2 * sizes["experts"]
    assert sizes["2"] - sizes["4"] == sizes["experts"]
    assert sizes["parameters 1"] == sizes["parameters 2"] == sizes["parameters 4"]


@pytest.mark.parametrize(
    ("degree", "how"),
    [
        (2, "gathered"),
        pytest.param(2, "by block", marks=whole("the same exchange")),
        pytest.param(4, "gathered", marks=whole("the same exchange")),
    ],
)
def test_evaluations_do_not_depend_on_how_experts_are_dealt(ranks, degree, how):
    """Ranks whose answers are written go on with the others: their experts are needed."""
    expected = ranks[4].ask("dealt", "evaluated", 1, "gathered")
    assert expected["metrics"]["eval/loss"] > 0
    assert len({len(answer) for answer in expected["answers"]}) > 1, "all answers end at once"
    found = ranks[4].ask("dealt", "evaluated", degree, how)
    assert found["metrics"] == pytest.approx(expected["metrics"], rel=1e-6)
    assert found["answers"] == expected["answers"]
    assert found["scores"] == pytest.approx(expected["scores"], rel=1e-5)


def test_replicas_of_dealt_experts_are_compared_place_by_place(ranks):
    before, after = ranks[4].ask("dealt", "flipped")
    assert before == "alike"
    assert "rank 3" in after and ".experts." in after

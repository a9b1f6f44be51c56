"""Ranks that share each row of documents take the steps of one process, under every strategy and for every objective."""

import itertools

import pytest

from tests.helpers.covering import EVERYTHING, chosen, takes, values
from tests.parity.matrix import names_for
from tests.parity.sequences import FAULTS, Case
from tests.parity.test_methods import BF16

TOLERANCE = 1e-5
STRATEGIES = names_for(4)
TOKEN_OBJECTIVES = ("sft", "pretrain", "smoothed", "distil", "reverse", "jensen", "replay", "held", "weighed_replay")
OBJECTIVES = (
    *TOKEN_OBJECTIVES,
    *("dpo", "ipo", "hinge", "orpo", "simpo", "kto"),
)
FEATURES = ("full", "selective", "auto", "accumulation")
ARCHITECTURES = ("llama", "llama_tied", "gemma2", "gemma3_text", "mistral", "gpt_oss", "qwen3_moe", "phi3", "gpt2")
MIXTURES = ("qwen3_moe", "mixtral")
MATRIX = [
    *itertools.product(OBJECTIVES, ("full", "lora"), ("llama",), STRATEGIES, (2, 4), ("plain",)),
    *itertools.product(("sft", "dpo"), ("full", "lora"), ("llama",), STRATEGIES, (2, 4), FEATURES),
    *itertools.product(OBJECTIVES[1:], ("full",), ("llama",), ("fsdp2",), (2, 4), FEATURES),
    *itertools.product(("sft", "pretrain"), ("full", "lora"), ("llama",), STRATEGIES, (2, 4), ("packing", "short")),
    *itertools.product(("sft",), ("full", "lora"), ("llama",), ("fsdp2", "zero2", "zero3"), (2, 4), ("noise",)),
    *itertools.product(("sft", "dpo"), ("lora",), ("llama",), ("ddp", "fsdp2", "zero3"), (2, 4), ("nf4",)),
    *itertools.product(("sft",), ("full", "lora"), ARCHITECTURES[1:], ("fsdp2", "zero3"), (2, 4), ("plain",)),
    *itertools.product(("sft",), ("full",), MIXTURES, ("fsdp2", "zero3"), (2, 4), ("routers", "short routers")),
]
OF_THREE = [
    (objective, "full", architecture, strategy, 3, "plain")
    for objective in ("sft", "dpo")
    for architecture in ("llama", "gpt_oss", "qwen3")
    for strategy in ("fsdp2", "zero3")
]


@pytest.fixture(scope="module", autouse=True)
def ranks_end(ranks):
    """Nobody else asks them, and they hold half a GiB each."""
    yield
    ranks[3].stop()
    ranks[4].stop()


def met(case):
    """What `make test` runs: each value of each axis, and full and LoRA with groups of either size."""
    case = Case(*case)
    objective = case.objective
    architecture = case.architecture
    # Other losses of the same pass are met by their kind.
    kinds = {
        "smoothed": "sft",
        "reverse": "distil",
        "jensen": "distil",
        "weighed_replay": "replay",
        "ipo": "dpo",
        "hinge": "dpo",
    }
    objective = kinds.get(objective, objective)
    if architecture in ("llama_tied", "gemma3_text", "mistral", "phi3", "gpt2"):
        architecture = "another block"
    if architecture in MIXTURES:
        architecture = "mixture"
    return {objective, architecture, case.strategy, case.feature, (case.tuning, case.degree)}


def assert_close(found, expected):
    """Loss and gradient norm as of one process. Metrics are compared absolutely: at the start rewards are 0."""
    assert len(found) == len(expected) == 3
    for (loss, norm, *metrics), (right_loss, right_norm, *right_metrics) in zip(found, expected, strict=True):
        assert loss == pytest.approx(right_loss, rel=TOLERANCE)
        assert norm == pytest.approx(right_norm, rel=TOLERANCE)
        # But for shares of answers, which jump where two rewards are equal but for rounding: at the start all are.
        for metric, right_metric in zip(metrics, right_metrics, strict=True):
            is_share = float(right_metric * 16).is_integer() and float(metric * 16).is_integer()
            assert is_share or metric == pytest.approx(right_metric, abs=1e-5)


@pytest.mark.parametrize("case", chosen(MATRIX, met, takes), ids=lambda case: " ".join(map(str, case)))
def test_shared_rows_train_as_one_process_does(ranks, case):
    if "nf4" in case:
        pytest.importorskip("bitsandbytes")
    curves = ranks[4].ask("sequences", "compare", *case)
    assert_close(curves["found"], curves["expected"])


@pytest.mark.parametrize("strategy", ("fsdp2", "zero2"))
def test_shared_rows_in_bf16_stay_as_near_as_other_strategies(ranks, strategy):
    curves = ranks[4].ask("sequences", "compare", "sft", "full", "llama", strategy, 2, "bf16")
    for (loss, norm), (right_loss, right_norm) in zip(curves["found"], curves["expected"], strict=True):
        assert loss == pytest.approx(right_loss, rel=BF16)
        assert norm == pytest.approx(right_norm, rel=BF16)
    assert curves["found"] != curves["expected"]


@pytest.mark.parametrize("case", chosen(OF_THREE, values, takes), ids=lambda case: " ".join(map(str, case)))
def test_three_ranks_share_heads_and_tokens_that_do_not_divide(ranks, case):
    curves = ranks[3].ask("sequences", "compare", *case)
    assert_close(curves["found"], curves["expected"])


@pytest.mark.parametrize("fault", list(FAULTS) if EVERYTHING else list(FAULTS)[:2])
def test_planted_fault_in_sequence_parallelism_shows(ranks, fault):
    """A comparison that one of the faults passes would prove nothing."""
    curves = ranks[4].ask("sequences", "planted", fault)
    with pytest.raises(AssertionError):
        assert_close(curves["found"], curves["expected"])


def test_run_resumes_with_another_number_of_ranks_to_a_row(ranks):
    curves = ranks[4].ask("sequences", "resumed")
    assert len(curves["found"]) == len(curves["expected"]) == 8
    for found, expected in zip(curves["found"], curves["expected"], strict=True):
        assert found == pytest.approx(expected, rel=TOLERANCE)


def test_held_out_loss_does_not_depend_on_how_many_ranks_share_a_row(ranks):
    whole, *shared = ranks[4].ask("sequences", "evaluated")
    assert whole["eval/loss"] > 0
    for values_of_degree in shared:
        assert values_of_degree == pytest.approx(whole, rel=1e-6)


def test_steps_have_the_same_samples_however_many_ranks_share_a_row(ranks):
    whole, *shared = ranks[4].ask("sequences", "order")
    assert shared == [whole, whole]


@pytest.mark.parametrize("degree", (2, 4))
def test_bytes_of_the_exchange_are_those_of_the_formula(ranks, degree):
    sizes = ranks[4].ask("sequences", "exchanged_bytes", degree)
    assert sizes["counted"] == sizes["expected"] > 0


@pytest.mark.parametrize(
    ("heads", "key_value_heads", "degree", "kind"),
    [
        (4, 2, 2, "plain"),
        (4, 1, 4, "plain"),
        (6, 3, 4, "sinks"),
        (4, 4, 4, "window"),
        (5, 5, 2, "narrow values"),
        (4, 2, 3, "plain"),
        (6, 3, 3, "sinks"),
        (9, 3, 3, "narrow values"),
    ],
)
def test_attention_over_slices_is_that_over_the_whole_row(ranks, heads, key_value_heads, degree, kind):
    world = 3 if degree == 3 else 4
    differences = ranks[world].ask("sequences", "attention", heads, key_value_heads, degree, kind)
    assert max(differences) < 1e-12


@pytest.mark.parametrize("degree", (2, 4))
def test_attention_over_slices_is_that_of_deepspeed_where_heads_and_tokens_divide(ranks, degree):
    assert max(ranks[4].ask("sequences", "beside_deepspeed", degree)) < 1e-12


def test_loss_of_shared_rows_is_that_of_plain_transformers(ranks):
    losses = ranks[4].ask("sequences", "beside_transformers")
    assert losses["shared"] == pytest.approx(losses["transformers"], rel=1e-6)

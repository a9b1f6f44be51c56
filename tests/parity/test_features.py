"""Settings that must not change the result, every class of model, precision, evaluation, resuming, gathering."""

import itertools
import math

import pytest

from tests.helpers.covering import chosen, takes, values, whole
from tests.helpers.learning import LEAST_LEARNED
from tests.parity import teachers
from tests.parity.features import LONG_ROWS, TUNINGS, VARIANTS
from tests.parity.methods import FEWER
from tests.parity.pairs import CASES as PAIRS
from tests.parity.two_sides import CASES as TWO_SIDED
from tests.parity.two_sides import GENERATING, WRITING

EXACT = 1e-5
STRATEGIES = ("ddp", "fsdp2", "hsdp", "zero1", "zero2", "zero3")
SHARDED = ("fsdp2", "zero3")


def product(*axes):
    return list(itertools.product(*axes))


def kinds(case):
    """By the strategy, the first axis: whose engine it is, and whether weights are kept whole."""
    return {(case[0].startswith("zero"), case[0] in (*SHARDED, "hsdp"))}


def assert_close(curves, rel=EXACT, least=3):
    assert len(curves["found"]) == len(curves["expected"]) >= least
    for (loss, norm), (right_loss, right_norm) in zip(curves["found"], curves["expected"], strict=True):
        assert loss == pytest.approx(right_loss, rel=rel)
        assert norm == pytest.approx(right_norm, rel=rel)


@pytest.mark.parametrize("name", VARIANTS)
def test_setting_does_not_change_the_result(ask, name):
    assert_close(ask("features", "variant", name))


@pytest.mark.parametrize(
    ("strategy", "tuning", "settings"), chosen(product(STRATEGIES, ("full", "lora"), LONG_ROWS), values, takes)
)
def test_tiles_and_inputs_on_the_host_do_not_change_the_result(ask, strategy, tuning, settings):
    assert_close(ask("features", "long_rows", strategy, tuning, settings))


def test_gradients_reduced_to_their_owners_train_alike(ask):
    assert_close(ask("features", "reduced_to_owners"))


def test_zero2_in_bf16_clips_and_skips_without_the_host(ask):
    found = ask("features", "zero2_on_device")
    assert found["reads"] == [0] * len(found["reads"]) and found["reads"]
    assert_close({"found": found["ours"], "expected": found["theirs"]}, 1e-3)
    assert found["skipped"] == [1.0, True, 0]  # nothing moved, nothing counted
    assert all(map(math.isfinite, found["going on"][-1])) and found["resumed"] == found["going on"]


def test_zero1_in_bf16_keeps_no_gradient_twice(ask):
    found = ask("features", "zero1_gradients")
    assert found["left"] == 0 and found["found"] == found["kept"]


@pytest.mark.parametrize("strategy", [strategy for (strategy,) in chosen(product(STRATEGIES), kinds)])
def test_the_loss_by_source_is_alike(ask, strategy):
    curves = ask("features", "sources", strategy)
    assert len(curves["found"]) == len(curves["expected"]) == 3
    for found, expected in zip(curves["found"], curves["expected"], strict=True):
        assert found == pytest.approx(expected, rel=EXACT) and len(found) == 2 and found[0] != found[1]


@whole(
    "tests/models/test_sweep.py compares every kind of layer with transformers, and matrices below train other architectures"
)
@pytest.mark.parametrize(
    ("architecture", "strategy"),
    chosen(
        product(("llama_tied", "qwen2", "qwen3", "gemma2", "gpt2", "falcon", "distilbert"), SHARDED),
        values,
        takes,
    ),
)
def test_architecture_trains_alike(ask, architecture, strategy):
    assert_close(ask("features", "architecture", architecture, strategy))


def grown(case):
    """Each tuning; a vocabulary grows where the embedding is the head, and where it is not."""
    architecture, _, tuning = case
    return values(case) | ({(architecture, tuning)} if tuning.startswith("new tokens") else set())


@pytest.mark.parametrize(
    ("architecture", "strategy", "tuning"),
    chosen(product(("llama", "llama_tied"), SHARDED, TUNINGS), grown, takes),
)
def test_tuning_trains_alike(ask, architecture, strategy, tuning):
    assert_close(ask("features", "tuning", architecture, strategy, tuning))


@pytest.mark.parametrize(
    ("strategy", "tuning", "precision", "band"),
    chosen(
        [
            *((*case, "bf16", 1e-2) for case in product(("ddp", "fsdp2", "zero2", "zero3"), ("full", "lora"))),
            *((strategy, "full", "fp16", 2e-3) for strategy in ("ddp", "fsdp2")),
        ],
        values,
        takes,
    ),
)
def test_half_precision_tracks_fp32(ask, strategy, tuning, precision, band):
    """Rounding to 8 (bf16) or 11 (fp16) bits of mantissa; the band is what the first six steps may differ by."""
    curves = ask("features", "half", strategy, tuning, precision)
    assert_close(curves, band)
    assert curves["found"] != curves["expected"]


def test_evaluation_does_not_depend_on_batch_or_ranks(ask):
    results = ask("features", "evaluation")
    assert len(results) == 5
    for found in results[1:]:
        assert found["eval/loss"] == pytest.approx(results[0]["eval/loss"], rel=1e-6)
        assert found["eval/accuracy"] == results[0]["eval/accuracy"] > 0


@pytest.mark.parametrize(
    ("labels", "strategy"), chosen(product(("one", "several"), ("ddp", "fsdp2", "zero3")), values, takes)
)
def test_weighted_labels_train_alike(ask, labels, strategy):
    assert_close(ask("features", "weighted_labels", labels, strategy))


@pytest.mark.parametrize("labels", ["one", "several"])
def test_f1_does_not_depend_on_batch_or_ranks(ask, labels):
    first, *others = ask("features", "f1", labels)
    assert len(others) == 3 and 0 < first["eval/f1_macro"] <= 1
    for found in others:
        assert found["eval/loss"] == pytest.approx(first["eval/loss"], rel=1e-6)
        for name in ("eval/accuracy", "eval/f1_macro", "eval/f1_micro"):
            assert found[name] == first[name], name


def resumed(case):
    """Each tuning, each kind of strategy; each strategy is in test_optimizers.py."""
    return {case[1], *kinds(case)}


@pytest.mark.parametrize(
    ("strategy", "tuning"),
    # Matrices of one row lie on one of two ranks where both hold shards.
    chosen(
        product(STRATEGIES, ("full", "lora", "rank-1 lora")),
        resumed,
        lambda case: takes(case) * (9 if "rank-1" in case[1] and case[0] != "fsdp2" else 1),
    ),
)
def test_resume_is_bit_equal_and_crosses_strategies(ask, strategy, tuning):
    found = ask("features", "resume", strategy, tuning)
    assert found["resumed"] == found["uninterrupted"]
    assert_close({"found": found["elsewhere"], "expected": found["uninterrupted"]}, least=2)


@pytest.mark.parametrize(
    ("strategy", "tuning"),
    chosen(product(("ddp", "fsdp2", "zero1", "zero2", "zero3"), ("full", "lora")), values, takes),
)
def test_gathered_parameters_are_the_same(ask, strategy, tuning):
    """Before training, adapters included, they are equal to the last bit; after it, within rounding."""
    found = ask("features", "gathered", strategy, tuning)
    assert found["before"] == 0.0
    assert found["after"] < 1e-6


ALIKE = {"zero1": "zero2", "hsdp": "fsdp2"}
"""Strategies whose engine does the same with losses and models: each is met in test_matrix.py."""


def words(case):
    """The axes of a case that is named by its words."""
    return values([ALIKE.get(word, word) for word in case.split()])


@pytest.mark.parametrize("case", chosen(PAIRS, words, lambda case: takes(case.split())))
def test_pairs_train_alike(ask, case):
    curves = ask("pairs", "compare", case)
    assert len(curves["found"]) == len(curves["expected"]) == FEWER
    for (loss, norm, margin), (right_loss, right_norm, right_margin) in zip(
        curves["found"], curves["expected"], strict=True
    ):
        assert loss == pytest.approx(right_loss, rel=EXACT)
        assert norm == pytest.approx(right_norm, rel=EXACT)
        # A difference of four log-probabilities of about -60, of which float32 keeps steps of 4e-6.
        assert margin == pytest.approx(right_margin, rel=EXACT, abs=5e-6)


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_pairs_are_learned_and_clipped(ask, tuning):
    """Curves that stand still, or references that move along, would prove little: at a rate of zero the loss stays log 2."""
    losses, norms, margins = zip(*ask("pairs", "compare", f"dpo {tuning} ddp")["expected"], strict=True)
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6) and abs(margins[0]) < 1e-5
    assert losses[-1] < (1 - LEAST_LEARNED) * math.log(2) and margins[-1] > 0.01
    assert max(norms) > 0.5


@pytest.mark.parametrize("case", chosen(TWO_SIDED, words, lambda case: takes(case.split())))
def test_encoder_decoder_models_train_alike(ask, case):
    curves = ask("two_sides", "compare", case)
    assert_close(curves)
    assert curves["learned"] > LEAST_LEARNED
    assert max(norm for _, norm in curves["expected"]) > 0.2, "nothing was clipped"


def answering(case):
    """Every class of model also where parameters are gathered: a rank that finished early must go on taking part."""
    architecture, strategy = case.split()
    return {architecture, ALIKE.get(strategy, strategy)} | (
        {f"{architecture} sharded"} if strategy in SHARDED else set()
    )


def answering_apart(case):
    """Every strategy, and each way of gathering under those that shard."""
    architecture, strategy, how = case.split(maxsplit=2)
    return {architecture} | ({f"{strategy} {how}"} if strategy in SHARDED else {ALIKE.get(strategy, strategy)})


def dear(case):
    """What gathers block by block takes longest, and longer where each document is a batch."""
    return takes(case.split()) * (2 if case.startswith("bart") else 1)


@pytest.mark.parametrize("case", chosen(GENERATING, answering, dear))
def test_answers_are_those_of_transformers(ask, case):
    """Also where ranks finish apart: sharded forward passes are collectives, and a rank that stopped would hang the rest."""
    found = ask("two_sides", "generate", case)
    assert found["found"] == found["expected"]
    assert len({answer for _, answer in found["found"]}) > 1
    assert not case.startswith("bart") or set(found["lengths"]) == {5, 13}
    there = {"eval/bleu", "eval/rougeL", "eval/written_tokens_per_s"}
    assert found["values"].keys() - {"eval/weights_gathered"} == there


@pytest.mark.parametrize("case", chosen(WRITING, answering_apart, lambda case: takes(case.split())))
def test_generated_answers_and_scores_are_those_of_one_process(ask, case):
    """Greedy answers up to a place where two logits nearly meet; draws by their own seeds; weights gathered once, or by block."""
    found = ask("two_sides", "write", case)
    sharded = case.split()[1] in (*SHARDED, "hsdp")
    assert found["greedy"] == [] and found["whole"] is (sharded and case.endswith("gathered"))
    assert found["scores"][0] == pytest.approx(found["scores"][1], rel=1e-5)
    drawn, expected = found["drawn"]
    assert [(one["prompt_index"], one["sample_index"]) for one in drawn] == [(n, d) for n in range(9) for d in (0, 1)]
    # Rounding decides where two noisy scores nearly meet, which happens to few of 18 draws on any machine.
    assert sum(one["ids"] == other["ids"] for one, other in zip(drawn, expected, strict=True)) >= 16
    assert len({one["text"] for one in drawn}) > 9


@pytest.mark.parametrize("strategy", SHARDED)
def test_weights_gathered_to_write_change_no_step(ask, strategy):
    found = ask("two_sides", "write_between_steps", strategy)
    for one, other in zip(found["found"], found["expected"], strict=True):
        assert one == pytest.approx(other, rel=EXACT)
    assert found["texts"][0] != found["texts"][2], "the weights written with are those trained"


def teaching(case):
    """The axes of a case."""
    return values([ALIKE.get(value, value) for value in teachers.CASES[teachers.NAMES.index(case)]])


def slow(case):
    """More layers, gathered one by one; and what has no lone run that others are compared with as well."""
    return takes(case.split()) * (2 if "gemma2" in case else 1) + (not case.endswith(" full llama fsdp2"))


@pytest.mark.parametrize("case", chosen(teachers.NAMES, teaching, slow))
def test_teachers_and_reference_points_train_alike(ask, case):
    curves = ask("teachers", "compare", case)
    assert len(curves["found"]) == len(curves["expected"]) == FEWER
    for found, expected in zip(curves["found"], curves["expected"], strict=True):
        assert found[:2] == pytest.approx(expected[:2], rel=EXACT)
        # Differences of log-probabilities of about -60, and divergences near 0 of logits of about 6: float32's own steps.
        assert found[2:] == pytest.approx(expected[2:], rel=EXACT, abs=5e-6)


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_teachers_and_reference_points_add_to_the_curves(ask, tuning):
    """Curves to which the divergence, the reference point or the clipping adds nothing would prove little."""
    kto, distil = (ask("teachers", "lone", f"{name} {tuning} llama ddp") for name in ("kto", "distil"))
    assert kto[-1][0] < 0.9 * kto[0][0] and kto[-1][5] > 0.2 and max(row[1] for row in kto) > 0.5
    assert distil[0][2] > 0.01 and distil[-1][0] < distil[0][0]
    if tuning == "full":
        assert kto[-1][2] > 0.05
        assert ask("teachers", "lone", "replay full llama ddp")[-1][3] > 1e-3


def test_objectives_with_a_teacher_differ(ask):
    named = [case for case in teachers.NAMES if case.endswith(" full llama fsdp2")]
    losses = {round(ask("teachers", "lone", case)[0][0], 4) for case in named}
    assert len(named) == len(losses) == 9


def test_ranks_take_the_same_library_of_products_whatever_each_measures(ask):
    """Replicas that step with different libraries drift apart, and a resumed run differs from the one that saved it."""
    (first, taken), (second, others) = ask("features", "library")
    assert first == second and first.startswith("blas ")
    assert taken == others == "highest"

"""Settings that must not change the result, every class of model, precision, evaluation, resuming, gathering."""

import itertools
import math

import pytest

from tests.helpers.launching import run_job
from tests.parity import teachers
from tests.parity.features import VARIANTS
from tests.parity.pairs import CASES
from tests.parity.two_sides import CASES as TWO_SIDED
from tests.parity.two_sides import GENERATING

EXACT = 1e-5


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return run_job("tests.parity.features", 2, tmp_path_factory.mktemp("features"))


def assert_close(curves, rel):
    assert len(curves["found"]) == len(curves["expected"]) >= 3
    for (loss, norm), (right_loss, right_norm) in zip(curves["found"], curves["expected"], strict=True):
        assert loss == pytest.approx(right_loss, rel=rel)
        assert norm == pytest.approx(right_norm, rel=rel)


@pytest.mark.parametrize("name", VARIANTS)
def test_setting_does_not_change_the_result(report, name):
    assert_close(report["variants"][name], EXACT)


@pytest.mark.parametrize(
    "case",
    [
        f"{architecture} {strategy}"
        for architecture in ("llama_tied", "qwen2", "qwen3", "gemma2", "gpt2", "falcon", "distilbert")
        for strategy in ("fsdp2", "zero3")
    ],
)
def test_architecture_trains_alike(report, case):
    assert_close(report["architectures"][case], EXACT)


@pytest.mark.parametrize(
    "case",
    [
        " ".join(parts)
        for parts in itertools.product(
            ("llama", "llama_tied"), ("fsdp2", "zero3"), ("dora", "rslora", "new tokens, lora", "new tokens, full")
        )
    ],
)
def test_tuning_trains_alike(report, case):
    assert_close(report["tunings"][case], EXACT)


@pytest.mark.parametrize(
    ("case", "band"),
    [(f"{s} {t}", 1e-2) for s in ("ddp", "fsdp2", "zero2", "zero3") for t in ("full", "lora")]
    + [("ddp fp16", 2e-3), ("fsdp2 fp16", 2e-3)],
)
def test_half_precision_tracks_fp32(report, case, band):
    """Rounding to 8 (bf16) or 11 (fp16) bits of mantissa; the band is what the first six steps may differ by."""
    assert_close(report["precision"][case], band)
    assert report["precision"][case]["found"] != report["precision"][case]["expected"]


def test_evaluation_does_not_depend_on_batch_or_ranks(report):
    results = list(report["evaluation"].values())
    assert len(results) == 5
    for found in results[1:]:
        assert found["eval/loss"] == pytest.approx(results[0]["eval/loss"], rel=1e-6)
        assert found["eval/accuracy"] == results[0]["eval/accuracy"] > 0


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero3"])
@pytest.mark.parametrize("labels", ["one", "several"])
def test_weighted_labels_train_alike(report, labels, strategy):
    assert_close(report["classification"][f"{labels} {strategy}"], EXACT)


@pytest.mark.parametrize("labels", ["one", "several"])
def test_f1_does_not_depend_on_batch_or_ranks(report, labels):
    first, *others = report["classification"][f"{labels} evaluation"]
    assert len(others) == 3 and 0 < first["eval/f1_macro"] <= 1
    for found in others:
        assert found["eval/loss"] == pytest.approx(first["eval/loss"], rel=1e-6)
        for name in ("eval/accuracy", "eval/f1_macro", "eval/f1_micro"):
            assert found[name] == first[name], name


@pytest.mark.parametrize("tuning", ["full", "lora", "rank-1 lora"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "hsdp", "zero1", "zero2", "zero3"])
def test_resume_is_bit_equal_and_crosses_strategies(report, strategy, tuning):
    found = report["resume"][f"{strategy} {tuning}"]
    assert found["resumed"] == found["uninterrupted"]
    for (loss, norm), (right_loss, right_norm) in zip(found["elsewhere"], found["uninterrupted"], strict=True):
        assert loss == pytest.approx(right_loss, rel=EXACT)
        assert norm == pytest.approx(right_norm, rel=EXACT)


@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero1", "zero2", "zero3"])
def test_gathered_parameters_are_the_same(report, strategy, tuning):
    """Before training, adapters included, they are equal to the last bit; after it, within rounding."""
    found = report["gathered"][f"{strategy} {tuning}"]
    assert found["before"] == 0.0
    assert found["after"] < 1e-6


@pytest.mark.parametrize("case", CASES)
def test_pairs_train_alike(report, case):
    curves = report["preferences"][case]
    assert len(curves["found"]) == len(curves["expected"]) == 5
    for (loss, norm, margin), (right_loss, right_norm, right_margin) in zip(*curves.values(), strict=True):
        assert loss == pytest.approx(right_loss, rel=EXACT)
        assert norm == pytest.approx(right_norm, rel=EXACT)
        # A difference of four log-probabilities of about -60, of which float32 keeps steps of 4e-6.
        assert margin == pytest.approx(right_margin, rel=EXACT, abs=5e-6)


@pytest.mark.parametrize("case", TWO_SIDED)
def test_encoder_decoder_models_train_alike(report, case):
    assert_close(report["two_sides"][case], EXACT)
    losses, norms = zip(*report["two_sides"][case]["expected"], strict=True)
    assert losses[-1] < losses[0] and max(norms) > 0.2, "nothing was learned, or nothing clipped"


@pytest.mark.parametrize("case", GENERATING)
def test_answers_are_those_of_transformers(report, case):
    """Also where ranks finish apart: sharded forward passes are collectives, and a rank that stopped would hang the rest."""
    found = report["generation"][case]
    assert found["found"] == found["expected"]
    assert len({answer for _, answer in found["found"]}) > 1
    assert not case.startswith("bart") or set(found["lengths"]) == {5, 13}
    assert found["values"].keys() == {"eval/bleu", "eval/rougeL"}


def test_pairs_are_learned_and_clipped(report):
    """Curves that stand still, or references that move along, would prove little."""
    for tuning in ("lora", "full"):
        losses, norms, margins = zip(*report["preferences"][f"dpo {tuning} ddp"]["expected"], strict=True)
        assert losses[0] == pytest.approx(math.log(2), abs=1e-6) and abs(margins[0]) < 1e-5
        assert losses[-1] < 0.98 * losses[0] and margins[-1] > 0.01
        assert max(norms) > 0.5


@pytest.mark.parametrize("case", teachers.NAMES)
def test_teachers_and_reference_points_train_alike(report, case):
    curves = report["teachers"][case]
    assert len(curves["found"]) == len(curves["expected"]) == 5
    for found, expected in zip(*curves.values(), strict=True):
        assert found[:2] == pytest.approx(expected[:2], rel=EXACT)
        # Differences of log-probabilities of about -60, and divergences near 0 of logits of about 6: float32's own steps.
        assert found[2:] == pytest.approx(expected[2:], rel=EXACT, abs=5e-6)


def test_what_teachers_and_reference_points_add_is_there(report):
    """Curves to which the divergence, the reference point or the clipping adds nothing would prove little."""
    expected = {case: curves["expected"] for case, curves in report["teachers"].items()}
    for tuning in ("lora", "full"):
        kto, distil = expected[f"kto {tuning} llama ddp"], expected[f"distil {tuning} llama ddp"]
        assert kto[-1][0] < 0.9 * kto[0][0] and kto[-1][5] > 0.2 and max(row[1] for row in kto) > 0.5
        assert distil[0][2] > 0.01 and distil[-1][0] < distil[0][0]
    assert expected["kto full llama ddp"][-1][2] > 0.05
    assert expected["replay full llama ddp"][-1][3] > 1e-3
    losses = [curve[0][0] for case, curve in expected.items() if " full llama " in case and "fsdp2" in case]
    assert len(losses) == 6 and len({round(loss, 4) for loss in losses}) == 6

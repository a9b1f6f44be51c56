"""Remedies against overfitting and forgetting give every strategy the steps and weights of one process."""

import itertools

import pytest

from tests.helpers.building import STRATEGIES
from tests.helpers.covering import chosen, takes, values, whole
from tests.parity.test_features import assert_close, kinds

MANY = [name for name in STRATEGIES if name != "single"]


def product(*axes):
    return list(itertools.product(*axes))


@pytest.mark.parametrize(
    ("strategy", "tuning"), chosen(product(MANY, ("full", "lora")), lambda case: {case[1], *kinds(case)}, takes)
)
def test_weight_average_is_that_of_one_process_and_training_does_not_see_it(ask, strategy, tuning):
    assert_averaged(ask("remedies", "average", strategy, tuning))


@pytest.mark.parametrize(
    ("strategy", "degree"),
    [
        ("fsdp2", 2),
        pytest.param("fsdp2", 4, marks=whole("each element is averaged by the rank that holds it")),
        pytest.param("hsdp", 2, marks=whole("each element is averaged by the rank that holds it")),
    ],
)
def test_weight_average_is_that_of_one_process_with_expert_parallelism(ranks, strategy, degree):
    """On four ranks. The average is then loaded by a strategy that keeps all experts on each rank."""
    assert_averaged(ranks[4].ask("remedies", "average", strategy, "full", degree))


def assert_averaged(found):
    """The average and the training beside it are those of one process. A wrong average would be off by what weights moved."""
    assert max(found["apart"]) < 1e-6 < 1e-4 < found["moved"]
    assert found["losses"][0] == pytest.approx(found["losses"][1], rel=1e-6)
    assert_close(found)


@pytest.mark.parametrize(("strategy", "tuning"), chosen(product(("fsdp2", "zero3"), ("full", "lora")), values, takes))
def test_smoothed_labels_train_alike(ask, strategy, tuning):
    assert_close(ask("remedies", "smoothed", strategy, tuning))


@pytest.mark.parametrize(
    ("strategy", "tuning", "layout"),
    chosen(product(("ddp", "fsdp2", "zero3"), ("full", "lora"), ("padding_free", "padded")), values, takes),
)
def test_noise_on_embeddings_is_the_same_under_every_strategy(ask, strategy, tuning, layout):
    found = ask("remedies", "noisy", strategy, tuning, layout)
    assert_close({key: found[key] for key in ("found", "expected")})
    assert abs(found["found"][0][0] - found["quiet"][0][0]) > 1e-4

"""Documents of which attention is a large part: how they are dealt."""

from types import SimpleNamespace

import numpy as np
import pytest

from tests.data.test_loader import loader, make_dataset
from trainer.build.parts import LONG_DOCUMENT, attention_matters
from trainer.config.run import RunConfig
from trainer.model.architecture import tokens_per_square

TOKENS_PER_SQUARE = 4
"""So small that attention is most of what the documents of 1 to 29 tokens cost."""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("long") / "data")


def busiest(plan, cost):
    """The cost of each micro-batch of the busiest rank, summed: what a step takes if all ranks wait for each other."""
    return sum(max(cost(micro_batch) for micro_batch in together) for together in zip(*plan, strict=True))


@pytest.mark.parametrize("units", [None, [[number, number + 1] for number in range(0, 24, 2)]])
def test_long_documents_are_dealt_by_their_squares_too(dataset, units):
    by_tokens = loader(dataset, size=3, micro=1, batch=12, units=units)
    by_cost = loader(dataset, size=3, micro=1, batch=12, units=units)
    by_cost.weigh_attention(TOKENS_PER_SQUARE)
    assert (by_cost.unit_tokens == by_tokens.unit_tokens).all()  # what budgets count

    def cost(documents):
        lengths = dataset.lengths[documents].astype(np.int64)
        return int((lengths + lengths**2 // TOKENS_PER_SQUARE).sum())

    waits = []
    for step in range(4):
        plans = [batches.plan(step * 12) for batches in (by_tokens, by_cost)]
        documents = [sorted(number for rank in plan for micro in rank for number in micro) for plan in plans]
        assert documents[0] == documents[1]
        waits.append([busiest(plan, cost) for plan in plans])
    tokens_alone, with_squares = np.array(waits).sum(axis=0)
    assert with_squares <= tokens_alone
    if units is not None:  # a pack of one long document costs more than one of as many tokens in short ones
        assert with_squares < tokens_alone


def test_documents_are_dealt_by_tokens_alone_up_to_32768():
    def train(longest):
        return SimpleNamespace(lengths=np.array([10, longest]))

    assert LONG_DOCUMENT == 32_768
    config = RunConfig()
    assert not attention_matters(config, train(32_768))
    assert attention_matters(config, train(32_769))
    config.parallel.sequence = 2
    assert attention_matters(config, train(10))


@pytest.mark.parametrize(
    ("layer_types", "expected"),
    [
        (None, 49_152),
        (["full_attention"] * 4, 49_152),
        (["sliding_attention"] * 3 + ["full_attention"], 4 * 49_152),
        (["linear_attention"] * 4, 4 * 49_152),
    ],
)
def test_squared_tokens_count_by_the_width_and_the_layers_that_see_far(layer_types, expected):
    settings = SimpleNamespace(vocab_size=1, hidden_size=4096, layer_types=layer_types)
    assert tokens_per_square(settings) == expected

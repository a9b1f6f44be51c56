"""Long documents: how they are dealt, and what their packs, their batch and their preview take."""

import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest

from tests.data.test_loader import counts, loader, make_dataset
from tests.helpers.stores import write
from trainer.build.parts import LONG_DOCUMENT_TOKENS, balances_by_squared_lengths
from trainer.data.batches.mixing import best_fit_decreasing
from trainer.data.report.preview import preview_text
from trainer.data.store.sequences import Sample, TokenDataset
from trainer.model.architecture import attention_crossover_tokens

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
    by_cost.balance_by_attention_cost(TOKENS_PER_SQUARE)
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


def test_long_document_takes_few_bytes_a_token_from_pack_to_preview(tmp_path):
    """At 100,000 tokens; what is held grows with them alone."""
    tokens = 100_000
    ids = np.random.default_rng(3).integers(1, 100, tokens).astype(np.int32)
    supervised = np.arange(tokens) >= tokens // 2
    shorts = [Sample(ids[:50], supervised[:50]) for _ in range(3)]
    write(tmp_path / "data", [Sample(ids, supervised), *shorts], counts, {"fingerprint": "f"})
    dataset = TokenDataset.open(tmp_path / "data")
    tokenizer = SimpleNamespace(decode=lambda ids, **_: "".join(chr(65 + token % 26) for token in ids))

    tracemalloc.start()
    packs = best_fit_decreasing(dataset.lengths, tokens + 100)
    (step,) = loader(dataset, micro=1, batch=1, units=[packs[0]]).steps(0, 1)
    batch_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    text = preview_text(dataset, tokenizer, width=100, colour=False)
    preview_bytes = tracemalloc.get_traced_memory()[1] - tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()

    assert packs[0] == [0, 1, 2] and step.tokens == tokens + 100
    assert batch_bytes < 150 * tokens
    # Ids as Python numbers, the text and its pieces; every character beside whether it is learned would be 100 bytes more.
    assert preview_bytes < 64 * tokens
    lines = text.splitlines()
    assert len(lines) == 41 and lines[20] == f"[... {-(-(tokens + 2) // 100) - 40} lines ...]"
    assert lines[0] == tokenizer.decode(ids[:100]) and lines[-1].endswith("⟧")


def test_documents_are_dealt_by_tokens_alone_up_to_32768():
    def balances(longest, sequence_ranks=1):
        return balances_by_squared_lengths(sequence_ranks, np.array([10, longest]))

    assert LONG_DOCUMENT_TOKENS == 32_768
    assert not balances(32_768)
    assert balances(32_769)
    assert balances(10, sequence_ranks=2)


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
    assert attention_crossover_tokens(settings) == expected

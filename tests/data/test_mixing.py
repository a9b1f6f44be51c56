import itertools
import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from strategies.errors import ConfigError, DataError
from trainer.data.batches import mixing
from trainer.data.batches.mixing import SourceMix, best_fit_decreasing, pack_by_source
from trainer.data.batches.order import MixedOrder
from trainer.data.config import EpochEnd, MixingConfig, MixOver


def mix(units, tokens, weights, documents=None, names=None):
    return SourceMix(names or [*map(str, range(len(units)))], weights, units, documents or units, tokens)


def quotas(units, tokens, weights, over=MixOver.documents, epoch=EpochEnd.first, **more):
    return mix(units, tokens, weights, **more).quotas(MixingConfig(over=over, epoch=epoch))


def realised(units, tokens, weights, got, **more):
    return mix(units, tokens, weights, **more).report_by_source(got)


SOURCES = st.integers(1, 4).flatmap(
    lambda n: st.tuples(
        st.lists(st.integers(1, 40), min_size=n, max_size=n),
        st.lists(st.integers(1, 500), min_size=n, max_size=n),
        st.lists(st.sampled_from([0.0, 0.05, 0.1, 0.25, 0.3, 0.5, 0.9, 1.0, 2.0]), min_size=n, max_size=n),
    )
)


@given(SOURCES, st.sampled_from(MixOver), st.sampled_from(EpochEnd))
def test_mixing_epoch_ends_as_promised_and_no_integer_quotas_come_nearer(sources, over, epoch):
    sizes, tokens, weights = sources
    tokens = [size + extra for size, extra in zip(sizes, tokens, strict=True)]
    assume(any(weights))
    got = quotas(sizes, tokens, weights, over, epoch).tolist()
    held = tokens if over is MixOver.tokens else sizes
    rates = [weight * size / amount for weight, size, amount in zip(weights, sizes, held, strict=True)]
    full = [size / rate for size, rate in zip(sizes, rates, strict=True) if rate]
    scale = min(full) if epoch is EpochEnd.first else max(full)
    ideal = [scale * rate for rate in rates]
    for number, size, rate, wanted in zip(got, sizes, rates, ideal, strict=True):
        assert (number > 0) == (rate > 0) and abs(number - wanted) < 1 + 1e-9
        if rate:
            assert number <= size if epoch is EpochEnd.first else number >= size
    used = [(number, size) for number, size, rate in zip(got, sizes, rates, strict=True) if rate]
    assert any(number == size for number, size in used)  # the source that ends the epoch is seen exactly once
    if all(wanted >= 1 for wanted in ideal if wanted) and max(ideal) < 60:
        choices = [{math.floor(wanted + 1e-9), math.ceil(wanted - 1e-9)} for wanted in ideal]
        nearest = min(
            sum((number - wanted) ** 2 for number, wanted in zip(choice, ideal, strict=True))
            for choice in itertools.product(*choices)
            if sum(choice) == sum(got)
        )
        assert sum((number - wanted) ** 2 for number, wanted in zip(got, ideal, strict=True)) <= nearest + 1e-6


def test_mixing_replays_a_general_source_beside_the_domain():
    sizes, tokens, weights = [900, 50_000], [90_000, 10_000_000], [0.9, 0.1]
    got = quotas(sizes, tokens, weights)
    assert got.tolist() == [900, 100]
    report = realised(sizes, tokens, weights, got, names=["domain", "general"])
    assert report["general"]["share_documents"] == report["general"]["requested"] == pytest.approx(0.1)
    assert report["general"]["share_tokens"] == pytest.approx(100 * 200 / (90_000 + 100 * 200))
    assert report["domain"]["passes"] == 1 and report["general"]["passes"] == 0.002


def test_mixing_weights_over_tokens():
    sizes, tokens, weights = [900, 50_000], [90_000, 10_000_000], [0.9, 0.1]
    got = quotas(sizes, tokens, weights, MixOver.tokens)
    assert got.tolist() == [900, 50]  # 10,000 of 100,000 tokens, at 200 a document
    report = realised(sizes, tokens, weights, got)
    assert report["1"]["share_tokens"] == pytest.approx(0.1) and report["1"]["tokens"] == 10_000


def test_mixing_all_repeats_the_small_source():
    assert quotas([10, 100], [10, 100], [1, 1], epoch=EpochEnd.all).tolist() == [100, 100]
    assert quotas([10, 100], [10, 100], [1, 1], epoch=EpochEnd.first).tolist() == [10, 10]


def test_mixing_shares_over_documents_count_the_documents_in_packs():
    # 100 documents in 10 packs beside 100 documents in 50 packs: equal shares need five times as many of the latter.
    got = quotas([10, 50], [1000, 5000], [1, 1], documents=[100, 100])
    assert got.tolist() == [10, 50]
    report = realised([10, 50], [1000, 5000], [1, 1], got, documents=[100, 100])
    assert report["0"]["share_documents"] == 0.5 and report["0"]["share_tokens"] == pytest.approx(1 / 6)


def test_mixing_weight_of_zero_leaves_a_source_out_and_a_tiny_weight_does_not():
    assert quotas([5, 5, 5], [5, 5, 5], [1, 0, 1e-9]).tolist() == [5, 0, 1]


def test_mixing_rounds_to_the_nearest_total_of_the_decimal_weights():
    assert quotas([10, 100], [10, 100], [3, 2]).tolist() == [10, 7]  # 6.67
    assert quotas([10, 100], [10, 100], [5, 1.1]).tolist() == [10, 2]  # 2.2
    assert quotas([5, 100], [5, 100], [0.2, 0.7]).tolist() == [5, 18]  # 17.5, but less in binary fractions


def test_mixing_shares_of_an_order_are_those_of_the_report():
    sizes, weights = [30, 200, 11], [0.7, 0.2, 0.1]
    lengths = np.random.default_rng(1).integers(1, 90, sum(sizes))
    source_of = np.repeat(np.arange(3), sizes)
    tokens = [int(lengths[source_of == source].sum()) for source in range(3)]
    got = quotas(sizes, tokens, weights, MixOver.tokens)
    report = realised(sizes, tokens, weights, got)
    order = MixedOrder(source_of, got, seed=3, shuffle=True)
    drawn = order.units(0, order.num_units * 400)
    for source in range(3):
        share = lengths[drawn][source_of[drawn] == source].sum() / lengths[drawn].sum()
        assert share == pytest.approx(report[str(source)]["share_tokens"], rel=0.02)


def test_mixing_refuses_a_weighted_source_without_documents_or_tokens():
    with pytest.raises(DataError, match=r"data\.sources\.b\.weight=0\.5: the source has no documents"):
        quotas([5, 0], [5, 0], [0.5, 0.5], names=["a", "b"])
    with pytest.raises(DataError, match="has no tokens"):
        quotas([5, 2], [5, 0], [0.5, 0.5], MixOver.tokens)
    assert quotas([5, 0], [5, 0], [0.5, 0]).tolist() == [5, 0]


def test_mixing_refuses_an_epoch_beyond_memory_and_names_the_repeated_source():
    with pytest.raises(ConfigError, match=r"data\.mixing\.epoch=all.*tiny is repeated"):
        quotas(
            [10, mixing.MAX_EPOCH_UNITS], [10, mixing.MAX_EPOCH_UNITS], [1, 1], epoch=EpochEnd.all, names=["tiny", "b"]
        )


@given(st.lists(st.tuples(st.integers(1, 50), st.sampled_from([0, 2, 5])), max_size=60), st.integers(50, 90))
def test_mixing_packs_stay_within_a_source(documents, capacity):
    lengths = np.array([length for length, _ in documents], dtype=np.int64)
    source_of = np.array([source for _, source in documents], dtype=np.int64)
    packs, source_of_pack = pack_by_source(lengths, source_of, capacity)
    assert len(packs) == len(source_of_pack) and source_of_pack.dtype == np.int64
    assert sorted(doc for pack in packs for doc in pack) == list(range(len(documents)))
    for pack, source in zip(packs, source_of_pack, strict=True):
        assert set(source_of[pack]) == {source} and lengths[pack].sum() <= capacity
    for source in set(source_of.tolist()):
        alone = best_fit_decreasing(lengths[source_of == source], capacity)
        assert (source_of_pack == source).sum() == len(alone)


def test_mixing_packs_a_single_source_by_best_fit():
    lengths = np.random.default_rng(2).integers(1, 60, 500)
    assert pack_by_source(lengths, np.zeros(500, dtype=np.int64), 64)[0] == best_fit_decreasing(lengths, 64)


def test_mixing_fills_the_packs_of_many_short_documents():
    lengths = np.clip(np.random.default_rng(0).exponential(150, 200_000), 1, 2048).astype(np.int64)
    packs, _ = pack_by_source(lengths, np.arange(200_000) % 3, 2048)
    assert lengths.sum() / (2048 * len(packs)) > 0.97

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.speed import seconds
from trainer.data.batches.mixing import best_fit_decreasing
from trainer.data.batches.order import GlobalOrder, MixedOrder, assign_to_slots, steps_for_tokens


@given(num=st.integers(1, 40), seed=st.integers(0, 2**40), start=st.integers(0, 200), count=st.integers(0, 100))
def test_order_units_are_a_function_of_the_sample_number(num, seed, start, count):
    order = GlobalOrder(num, seed, True)
    got = order.units(start, count)
    fresh = [int(GlobalOrder(num, seed, True).units(n, 1)[0]) for n in range(start, start + count)][:20]
    assert got[:20].tolist() == fresh and len(got) == count


@given(
    num=st.integers(1, 20),
    passed=st.lists(st.tuples(st.integers(0, 60), st.integers(0, 15)), max_size=5),
    start=st.integers(0, 40),
    count=st.integers(0, 30),
)
def test_order_without_skipped_samples_is_as_if_they_had_never_been_there(num, passed, start, count):
    order = GlobalOrder(num, 1, True)
    whole = order.units(0, 300).tolist()
    left = [
        unit for place, unit in enumerate(whole) if not any(first <= place < first + size for first, size in passed)
    ]
    order.set_skipped(passed)
    assert order.units(start, count).tolist() == left[start : start + count]
    where = [place for first, size in order.position_ranges(start, count) for place in range(first, first + size)]
    assert [whole[place] for place in where] == left[start : start + count]


@given(num=st.integers(1, 200), seed=st.integers(0, 99))
def test_order_of_every_epoch_is_a_permutation(num, seed):
    order = GlobalOrder(num, seed, True)
    for epoch in range(3):
        assert sorted(order.units(epoch * num, num).tolist()) == list(range(num))


def test_order_differs_by_epoch_and_seed_and_can_keep_file_order():
    order = GlobalOrder(100, 0, True)
    assert order.units_of_epoch(0).tolist() != order.units_of_epoch(1).tolist()
    assert order.units_of_epoch(0).tolist() != GlobalOrder(100, 1, True).units_of_epoch(0).tolist()
    assert GlobalOrder(5, 0, False).units(3, 5).tolist() == [3, 4, 0, 1, 2]


def test_the_order_never_changes_between_versions():
    assert GlobalOrder(10, 42, True).units_of_epoch(0).tolist() == [0, 1, 4, 2, 6, 8, 5, 9, 7, 3]


@given(lengths=st.lists(st.integers(1, 2000), min_size=1, max_size=64), slots=st.integers(1, 8))
def test_deal_fills_every_slot_and_loses_nothing(lengths, slots):
    capacity = max(1, len(lengths) // slots)
    lengths = (lengths * slots * capacity)[: slots * capacity]
    dealt = assign_to_slots(np.array(lengths), slots, capacity)
    assert sorted(p for slot in dealt for p in slot) == list(range(len(lengths)))
    assert [len(slot) for slot in dealt] == [capacity] * slots
    loads = [sum(lengths[p] for p in slot) for slot in dealt]
    assert loads == sorted(loads, reverse=True)
    assert loads[0] - loads[-1] <= max(lengths) * capacity
    assert dealt == assign_to_slots(np.array(lengths), slots, capacity)


@given(lengths=st.lists(st.integers(0, 9), min_size=12, max_size=12), capacity=st.sampled_from([1, 2, 3, 4, 6]))
def test_deal_gives_each_document_to_the_lightest_slot_with_room(lengths, capacity):
    """Against the rule written out, with many ties: the lowest number wins."""
    slots = [[] for _ in range(12 // capacity)]

    def load(slot):
        return sum(lengths[position] for position in slots[slot])

    for position in sorted(range(12), key=lambda p: (-lengths[p], p)):
        room = [slot for slot in range(len(slots)) if len(slots[slot]) < capacity]
        slots[min(room, key=lambda slot: (load(slot), slot))].append(position)
    heaviest = sorted(range(len(slots)), key=lambda slot: (-load(slot), slot))
    assert assign_to_slots(np.array(lengths), len(slots), capacity) == [sorted(slots[slot]) for slot in heaviest]


def test_deal_balances_tokens():
    lengths = np.random.default_rng(0).integers(10, 1000, 64 * 4)
    loads = [lengths[slot].sum() for slot in assign_to_slots(lengths, 64, 4)]
    in_order = lengths.reshape(64, 4).sum(1)
    assert max(loads) / np.mean(loads) < 1.1 < in_order.max() / in_order.mean()


@given(
    tokens=st.lists(st.integers(1, 50), min_size=1, max_size=20),
    batch=st.integers(1, 7),
    wanted=st.integers(1, 3000),
)
def test_steps_for_tokens_is_the_first_step_that_reaches_the_number(tokens, batch, wanted):
    order = GlobalOrder(len(tokens), 3, True)
    steps = steps_for_tokens(order, np.array(tokens), batch, wanted)

    def consumed(n):
        return int(np.array(tokens)[order.units(0, n * batch)].sum())

    assert consumed(steps) >= wanted
    assert steps == 0 or consumed(steps - 1) < wanted


@given(lengths=st.lists(st.integers(1, 100), max_size=80), capacity=st.integers(100, 200))
def test_packs_hold_every_document_once_and_never_overflow(lengths, capacity):
    packs = best_fit_decreasing(np.array(lengths, dtype=np.int64), capacity)
    assert sorted(doc for pack in packs for doc in pack) == list(range(len(lengths)))
    assert all(sum(lengths[doc] for doc in pack) <= capacity for pack in packs)
    opened: list[int] = []  # the rule, written plainly
    for doc in sorted(range(len(lengths)), key=lambda d: -lengths[d]):
        rooms = [room for room in opened if room >= lengths[doc]]
        if rooms:
            opened.remove(min(rooms))
        opened.append((min(rooms) if rooms else capacity) - lengths[doc])
    assert len(packs) == len(opened)


def test_packing_is_fast_and_full():
    lengths = np.random.default_rng(0).integers(1, 1000, 50_000)
    began = time.thread_time()  # of nobody else in this process
    packs = best_fit_decreasing(lengths, 2048)
    assert time.thread_time() - began < seconds(1)  # where each document looks at each pack it is minutes
    assert lengths.sum() / (2048 * len(packs)) > 0.99


def test_a_document_longer_than_a_pack_is_refused():
    with pytest.raises(ValueError, match=r"1\.\.10"):
        best_fit_decreasing(np.array([3, 11]), 10)


MIXES = st.integers(1, 4).flatmap(
    lambda n: st.tuples(
        st.lists(st.integers(0, n - 1), min_size=1, max_size=30), st.lists(st.integers(0, 40), min_size=n, max_size=n)
    )
).map(lambda mix: (mix[0], [quota if source in mix[0] else 0 for source, quota in enumerate(mix[1])]))  # fmt: skip
MIXES = MIXES.filter(lambda mix: sum(mix[1]) > 0)


@given(num=st.integers(1, 50), seed=st.integers(0, 2**40), epoch=st.integers(0, 9))
def test_order_of_one_source_is_argsorted_philox_bits(num, seed, epoch):
    bits = np.random.Philox(np.random.SeedSequence([seed, epoch])).random_raw(num)
    assert GlobalOrder(num, seed, True).units_of_epoch(epoch).tolist() == np.argsort(bits, kind="stable").tolist()


@given(
    mix=MIXES, seed=st.integers(0, 2**40), shuffle=st.booleans(), start=st.integers(0, 200), count=st.integers(0, 99)
)
def test_mixed_units_are_a_function_of_the_sample_number(mix, seed, shuffle, start, count):
    source_of, quotas = np.array(mix[0]), mix[1]
    order = MixedOrder(source_of, quotas, seed, shuffle)
    got = order.units(start, count).tolist()
    walked = MixedOrder(source_of, quotas, seed, shuffle).units(0, start + count).tolist()
    backwards = [int(order.units(n, 1)[0]) for n in reversed(range(start, start + count))][::-1]
    assert got == walked[start:] == backwards
    assert order.num_units == sum(quotas) and order.population == len(source_of)


@given(mix=MIXES, seed=st.integers(0, 99), shuffle=st.booleans())
def test_mixed_order_has_its_quotas_each_epoch_and_equal_uses_at_every_sample(mix, seed, shuffle):
    source_of, quotas = np.array(mix[0]), mix[1]
    order = MixedOrder(source_of, quotas, seed, shuffle)
    uses = np.zeros(len(source_of), dtype=np.int64)
    for epoch in range(5):
        drawn = order.units_of_epoch(epoch)
        assert np.bincount(source_of[drawn], minlength=len(quotas)).tolist() == quotas
        for unit in drawn.tolist():
            uses[unit] += 1
            of_source = uses[source_of == source_of[unit]]
            assert of_source.max() - of_source.min() <= 1


def test_mixed_order_shows_other_documents_of_a_down_weighted_source_each_epoch():
    order = MixedOrder(np.repeat([0, 1], [20, 100]), [20, 10], 0, True)
    shown = [[unit for unit in order.units_of_epoch(epoch).tolist() if unit >= 20] for epoch in range(20)]
    first, second = ([unit for epoch in part for unit in epoch] for part in (shown[:10], shown[10:]))
    assert sorted(first) == sorted(second) == list(range(20, 120))
    assert first != second  # the second pass has an order of its own
    of_domain = [[unit for unit in order.units_of_epoch(epoch).tolist() if unit < 20] for epoch in range(2)]
    assert of_domain[0] != of_domain[1] and sorted(of_domain[0]) == list(range(20))


def test_order_puts_every_unit_at_every_place_of_an_epoch_equally_often():
    source_of, quotas = np.repeat([0, 1], [3, 6]), [3, 2]
    counts = np.zeros((9, 5))
    for seed in range(6000):
        counts[MixedOrder(source_of, quotas, seed, True).units_of_epoch(0), np.arange(5)] += 1
    expected = 6000 * np.repeat([1 / 5, 2 / 5 / 6], [3, 6])[:, None]
    assert (((counts - expected) ** 2 / expected).sum(axis=0) < 30).all()  # chi squared with 8 degrees of freedom


def test_order_draws_of_epochs_sources_and_seeds_are_not_related():
    def of(source, epoch, seed):
        drawn = MixedOrder(np.repeat([0, 1], 40), [40, 40], seed, True).units_of_epoch(epoch)
        return (drawn[drawn // 40 == source] % 40).tolist()

    seen = [of(source, epoch, seed) for source in (0, 1) for epoch in (0, 1, 2) for seed in (0, 1)]
    seen += [GlobalOrder(40, seed, True).units_of_epoch(epoch).tolist() for epoch in (0, 1, 2) for seed in (0, 1)]
    assert len({tuple(drawn) for drawn in seen}) == len(seen)


@given(quotas=st.lists(st.integers(0, 50), min_size=1, max_size=5).filter(any))
def test_mixed_order_spreads_unshuffled_sources_evenly_in_their_order(quotas):
    source_of = np.repeat(np.arange(len(quotas)), [quota + 3 for quota in quotas])
    order = MixedOrder(source_of, quotas, 0, False)
    drawn = order.units(0, 3 * order.num_units)
    for source, quota in enumerate(quotas):
        members = np.flatnonzero(source_of == source)
        assert drawn[source_of[drawn] == source].tolist() == np.resize(members, 3 * quota).tolist()
        given_so_far = np.cumsum(source_of[drawn] == source)
        even = np.arange(1, len(drawn) + 1) * quota / order.num_units
        assert abs(given_so_far - even).max() <= 0.5 + len(quotas) / 2 * quota / order.num_units + 1


def test_the_mixed_order_never_changes_between_versions():
    order = MixedOrder(np.array([0, 0, 0, 1, 1, 1, 1, 1]), [3, 2], 42, True)
    assert [order.units_of_epoch(epoch).tolist() for epoch in range(3)] == [
        [2, 5, 1, 4, 0],
        [0, 1, 6, 2, 7],
        [1, 0, 3, 4, 2],
    ]


@given(
    mix=MIXES,
    tokens=st.lists(st.integers(1, 50), min_size=30, max_size=30),
    shuffle=st.booleans(),
    batch=st.integers(1, 7),
    wanted=st.integers(1, 6000),
)
def test_steps_for_tokens_walks_mixed_epochs_exactly(mix, tokens, shuffle, batch, wanted):
    source_of, quotas = np.array(mix[0]), mix[1]
    unit_tokens = np.array(tokens[: len(source_of)])
    order = MixedOrder(source_of, quotas, 3, shuffle)
    total = unit = 0
    while total < wanted:
        total += int(unit_tokens[order.units(unit, 1)[0]])
        unit += 1
    assert steps_for_tokens(order, unit_tokens, batch, wanted) == -(-unit // batch)
    for epoch in range(4):
        before = int(unit_tokens[order.units(0, epoch * order.num_units)].sum())
        assert order.tokens_before(epoch, unit_tokens) == before


def test_mixed_order_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one unit"):
        MixedOrder(np.zeros(3, dtype=np.int64), [0], 0, True)

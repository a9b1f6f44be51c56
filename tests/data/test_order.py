import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.order import GlobalOrder, deal, steps_for_tokens
from trainer.data.pack import best_fit_decreasing


@given(num=st.integers(1, 40), seed=st.integers(0, 2**40), start=st.integers(0, 200), count=st.integers(0, 100))
def test_units_are_a_function_of_the_sample_number(num, seed, start, count):
    order = GlobalOrder(num, seed, True)
    got = order.units(start, count)
    fresh = [int(GlobalOrder(num, seed, True).units(n, 1)[0]) for n in range(start, start + count)][:20]
    assert got[:20].tolist() == fresh and len(got) == count


@given(num=st.integers(1, 200), seed=st.integers(0, 99))
def test_every_epoch_is_a_permutation(num, seed):
    order = GlobalOrder(num, seed, True)
    for epoch in range(3):
        assert sorted(order.units(epoch * num, num).tolist()) == list(range(num))


def test_epochs_and_seeds_differ_and_file_order_is_kept():
    order = GlobalOrder(100, 0, True)
    assert order.epoch(0).tolist() != order.epoch(1).tolist()
    assert order.epoch(0).tolist() != GlobalOrder(100, 1, True).epoch(0).tolist()
    assert GlobalOrder(5, 0, False).units(3, 5).tolist() == [3, 4, 0, 1, 2]


def test_the_order_never_changes_between_versions():
    assert GlobalOrder(10, 42, True).epoch(0).tolist() == [0, 1, 4, 2, 6, 8, 5, 9, 7, 3]


@given(lengths=st.lists(st.integers(1, 2000), min_size=1, max_size=64), slots=st.integers(1, 8))
def test_deal_fills_every_slot_and_loses_nothing(lengths, slots):
    capacity = max(1, len(lengths) // slots)
    lengths = (lengths * slots * capacity)[: slots * capacity]
    dealt = deal(np.array(lengths), slots, capacity)
    assert sorted(p for slot in dealt for p in slot) == list(range(len(lengths)))
    assert [len(slot) for slot in dealt] == [capacity] * slots
    loads = [sum(lengths[p] for p in slot) for slot in dealt]
    assert loads == sorted(loads, reverse=True)
    assert loads[0] - loads[-1] <= max(lengths) * capacity
    assert dealt == deal(np.array(lengths), slots, capacity)


def test_deal_balances_tokens():
    lengths = np.random.default_rng(0).integers(10, 1000, 64 * 4)
    loads = [lengths[slot].sum() for slot in deal(lengths, 64, 4)]
    in_order = lengths.reshape(64, 4).sum(1)
    assert max(loads) / np.mean(loads) < 1.1 < in_order.max() / in_order.mean()


@given(
    tokens=st.lists(st.integers(1, 50), min_size=1, max_size=20),
    batch=st.integers(1, 7),
    wanted=st.integers(0, 3000),
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
    began = time.process_time()
    packs = best_fit_decreasing(lengths, 2048)
    assert time.process_time() - began < 1
    assert lengths.sum() / (2048 * len(packs)) > 0.99


def test_a_document_longer_than_a_pack_is_refused():
    with pytest.raises(ValueError, match=r"1\.\.10"):
        best_fit_decreasing(np.array([3, 11]), 10)

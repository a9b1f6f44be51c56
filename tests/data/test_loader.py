import threading
from itertools import pairwise

import numpy as np
import pytest
import torch

from tests.helpers.stores import write
from trainer.data.batches.collate import Collator
from trainer.data.batches.loader import BatchShare, EvalShare, StepLoader, eval_batches
from trainer.data.batches.mixing import best_fit_decreasing
from trainer.data.batches.order import GlobalOrder
from trainer.data.config import Layout
from trainer.data.store.sequences import LABEL, Sample, TokenDataset
from trainer.objectives.classification import LabelCollator

NUM = 24


def counts(sample):
    return {"loss": int(sample.supervised.sum()), "documents": 1}


def make_dataset(path, *, labels=False):
    """Document i has 1 to 30 tokens, the first of which is 1000 + i, so that batches tell what they hold."""
    draw = np.random.default_rng(5)
    samples = []
    for number in range(NUM):
        ids = draw.integers(1, 100, draw.integers(1, 30)).astype(np.int32)
        ids[0] = 1000 + number
        supervised = draw.random(len(ids)) < 0.6
        samples.append(Sample(ids, supervised, {LABEL: number % 3} if labels else {}))
    write(path, samples, counts, {"fingerprint": "f"})
    return TokenDataset.open(path)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("loader") / "data")


def loader(
    dataset, *, rank=0, size=1, micro=2, batch=12, units=None, layout=Layout.padding_free, seed=7, kind=Collator
):
    order = GlobalOrder(len(dataset) if units is None else len(units), seed, True)
    return StepLoader(
        dataset,
        order=order,
        units=units,
        share=BatchShare(batch, micro, rank, size),
        collator=kind(layout, 0),
        device="cpu",
    )


def documents_in(batch):
    ids = batch["input_ids"]
    return sorted((ids[ids >= 1000] - 1000).tolist())


@pytest.mark.parametrize("layout", [Layout.padding_free, Layout.padded])
@pytest.mark.parametrize(("size", "micro"), [(1, 1), (1, 12), (2, 3), (3, 2), (4, 1), (4, 3), (6, 2), (12, 1)])
def test_loader_ranks_together_have_the_global_batch(dataset, size, micro, layout):
    ranks = [list(loader(dataset, rank=r, size=size, micro=micro, layout=layout).steps(0, 3)) for r in range(size)]
    order = GlobalOrder(NUM, 7, True)
    for step in range(3):
        wanted = order.units(step * 12, 12)
        parts = [rank[step] for rank in ranks]
        held = sorted(d for part in parts for batch in part.micro_batches for d in documents_in(batch))
        assert held == sorted(wanted.tolist())
        assert {len(part.micro_batches) for part in parts} == {12 // (size * micro)}
        assert all(len(documents_in(batch)) == micro for part in parts for batch in part.micro_batches)
        targets = sum(int((b["targets"] != -100).sum()) for part in parts for b in part.micro_batches)
        for part in parts:
            assert part.totals == {"loss": targets, "documents": 12}
            assert part.supervised_tokens == targets and part.samples == 12
            assert part.tokens == sum(p.local_tokens for p in parts) == int(dataset.lengths[wanted].sum())


def test_loader_padding_free_layout(dataset):
    (step,) = loader(dataset, micro=12).steps(0, 1)
    batch = step.micro_batches[0]
    edges = batch["cu_seq_lens_q"].tolist()
    assert batch["cu_seq_lens_q"].dtype == torch.int32 and batch["cu_seq_lens_k"].tolist() == edges
    assert batch["max_length_q"] == batch["max_length_k"] == max(np.diff(edges)) and len(edges) == 13
    for begin, end in pairwise(edges):
        number = int(batch["input_ids"][0, begin]) - 1000
        sample = dataset.sample(number)
        assert batch["input_ids"][0, begin:end].tolist() == sample.input_ids.tolist()
        assert batch["position_ids"][0, begin:end].tolist() == list(range(end - begin))
        wanted = [int(t) if s else -100 for t, s in zip(sample.input_ids[1:], sample.supervised[1:], strict=True)]
        assert batch["targets"][0, begin:end].tolist() == [*wanted, -100]
    assert "labels" not in batch and batch["targets"].dtype == torch.int64


def test_loader_padded_layout_has_the_same_content(dataset):
    (free,) = loader(dataset, micro=12).steps(0, 1)
    (padded,) = loader(dataset, micro=12, layout=Layout.padded).steps(0, 1)
    row, flat = padded.micro_batches[0], free.micro_batches[0]
    mask = row["attention_mask"].bool()
    for key in ("input_ids", "targets", "position_ids"):
        assert row[key][mask].tolist() == flat[key][0].tolist()
    assert (row["targets"][~mask] == -100).all() and (row["input_ids"][~mask] == 0).all()
    assert row["attention_mask"].dtype == torch.int64 and row["input_ids"].shape[1] == flat["max_length_q"]


def test_loader_batches_have_the_labels(tmp_path):
    data = make_dataset(tmp_path / "data", labels=True)
    for layout in (Layout.padded, Layout.padding_free):
        (step,) = loader(data, micro=12, layout=layout, kind=LabelCollator).steps(0, 1)
        batch = step.micro_batches[0]
        ids = batch["input_ids"]
        assert batch["labels"].tolist() == ((ids[ids >= 1000] - 1000) % 3).tolist()


def test_loader_units_are_packs(dataset):
    units = best_fit_decreasing(dataset.lengths, 64)
    batch = len(units) // 2 * 2
    parts = [list(loader(dataset, rank=r, size=2, micro=1, batch=batch, units=units).steps(0, 1)) for r in (0, 1)]
    wanted = GlobalOrder(len(units), 7, True).units(0, batch)
    held = sorted(d for part in parts for b in part[0].micro_batches for d in documents_in(b))
    assert held == sorted(d for unit in wanted for d in units[unit])
    assert parts[0][0].samples == batch and parts[0][0].totals["documents"] == len(held)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) if torch.is_tensor(a[k]) else a[k] == b[k] for k in a)


def test_loader_resumed_in_the_middle_gives_the_same_batches(dataset):
    whole = list(loader(dataset, rank=1, size=2, micro=3).steps(0, 6))
    rest = list(loader(dataset, rank=1, size=2, micro=3).steps(3 * 12, 3))
    for a, b in zip(whole[3:], rest, strict=True):
        assert a.totals == b.totals
        assert all(same(x, y) for x, y in zip(a.micro_batches, b.micro_batches, strict=True))


def running():
    return [t for t in threading.enumerate() if t.name == "loader"]


def test_loader_closing_stops_its_thread(dataset):
    steps = loader(dataset).steps(0, 1000)
    next(steps)
    assert running()
    steps.close()
    assert not running()


def test_loader_thread_errors_reach_the_consumer(dataset, monkeypatch):
    broken = loader(dataset)
    real = broken._make_step_batch
    monkeypatch.setattr(broken, "_make_step_batch", lambda first: real(first) if first < 12 else 1 / 0)
    steps = broken.steps(0, 5)
    next(steps)
    with pytest.raises(ZeroDivisionError):
        next(steps)
    assert not running()


@pytest.mark.parametrize("limit", [None, 1, 5, 100])
@pytest.mark.parametrize(("size", "batch"), [(1, 1), (2, 5), (3, 4), (5, 24), (8, 2)])
def test_loader_evaluates_every_document_once(dataset, size, batch, limit):
    collator = Collator(Layout.padded, 0)
    ranks = [list(eval_batches(dataset, EvalShare(batch, r, size, limit), collator, "cpu")) for r in range(size)]
    assert len({len(rank) for rank in ranks}) == 1, "all ranks take the same number of turns"
    num = min(limit or NUM, NUM)
    scored = sum(int((b["targets"] != -100).sum()) for rank in ranks for b in rank)
    assert scored == int(dataset.num_supervised[:num].sum())
    held = sorted(d for rank in ranks for b in rank for d in documents_in(b))
    fillers = len(held) - num
    assert held == sorted([*range(num), *[0] * fillers])
    assert fillers < size


def test_loader_evaluation_fillers_have_no_label(tmp_path):
    data = make_dataset(tmp_path / "data", labels=True)
    labels = []
    for rank in range(5):
        for batch in eval_batches(data, EvalShare(NUM, rank, 5), LabelCollator(Layout.padding_free, 0), "cpu"):
            labels += batch["labels"].tolist()
    assert sorted(labels) == sorted([*(n % 3 for n in range(NUM)), -100, -100, -100, -100])


def test_dataset_round_trip_and_damage(tmp_path):
    data = make_dataset(tmp_path / "data", labels=True)
    assert len(data) == NUM and data.fingerprint == "f"
    assert not any(data.sample(i).supervised[0] for i in range(NUM)), "a first token is never a target"
    assert data.counts["loss"].tolist() == [int(data.sample(i).supervised.sum()) for i in range(NUM)]
    assert [data.sample(i).marks[LABEL] for i in range(4)] == [0, 1, 2, 0]
    with (tmp_path / "data" / "tokens.bin").open("ab") as file:
        file.write(b"x")
    from strategies.errors import DataError

    with pytest.raises(DataError, match=r"tokens\.bin"):
        TokenDataset.open(tmp_path / "data")


@pytest.mark.parametrize("size", [1, 2])
def test_loader_balance_is_the_share_of_the_ranks_time_that_is_work(dataset, size):
    made = loader(dataset, size=size, micro=3)
    plan, batch = made.plan(0), next(made.steps(0, 1))
    loads = [[int(dataset.lengths[slot].sum()) for slot in rank] for rank in plan]
    busiest = sum(max(rank[m] for rank in loads) for m in range(made.accumulation))
    assert batch.parallel_efficiency == pytest.approx(batch.tokens / size / busiest)
    assert (batch.parallel_efficiency == 1.0) == (size == 1)


def test_loader_collates_evaluation_in_a_thread_into_pinned_memory(dataset, monkeypatch):
    """As training is; on a GPU, which only the two calls that reach for it would need."""
    threads, pinned = set(), []

    class Noting(Collator):
        def __call__(self, samples, cut=None):
            threads.add(threading.current_thread().name)
            return super().__call__(samples)

    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor.clone())
    monkeypatch.setattr("trainer.data.batches.loader.to_device", lambda batch, device: batch)
    batches = eval_batches(dataset, EvalShare(3, 0, 1), Noting(Layout.padding_free, 0), "cuda")
    first = next(batches)
    assert threads == {"loader"}
    assert {name for name, value in first.items() if torch.is_tensor(value)} >= {"input_ids", "targets"}
    assert not any(value is tensor for value in first.values() for tensor in pinned) and pinned
    batches.close()
    assert not running()


def test_loader_evaluation_errors_reach_the_consumer(dataset):
    class Failing(Collator):
        def __call__(self, samples, cut=None):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        list(eval_batches(dataset, EvalShare(3, 0, 1), Failing(Layout.padding_free, 0), "cpu"))
    assert not running()

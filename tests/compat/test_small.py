"""What the project uses of sacrebleu, datasets and Python's process pools beside their public interface."""

import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import numpy as np
import pytest

from tests.helpers.speed import seconds
from trainer.data.compat import close_own_writer
from trainer.data.read.compat import content_fingerprint
from trainer.evaluation.tasks.compat import weighted_score

ANSWERS = ["the cat sat on the mat", "a dog ran through the old park", "birds sing in the morning"]
REFERENCES_COLUMN = ["the cat sat on a mat", "the dog ran through the park", "birds often sing in the early morning"]


@pytest.mark.parametrize("metric", ["BLEU", "CHRF"])
def test_a_weighted_score_is_that_of_a_corpus_with_each_answer_as_often(metric):
    metrics = pytest.importorskip("sacrebleu.metrics")
    judge = getattr(metrics, metric)()
    of = weighted_score(judge, ANSWERS, REFERENCES_COLUMN)
    for weights in ([1, 1, 1], [2, 0, 1], [0, 3, 0]):
        rows = np.repeat(np.arange(3), weights)
        drawn = [ANSWERS[row] for row in rows], [[REFERENCES_COLUMN[row] for row in rows]]
        assert of(np.array(weights)) == pytest.approx(judge.corpus_score(*drawn).score, abs=1e-9)


def test_dataset_fingerprint_is_that_of_its_content():
    datasets = pytest.importorskip("datasets")
    rows = {"text": ["one", "two", "three"]}
    first = datasets.Dataset.from_dict(rows)
    assert content_fingerprint(first) == content_fingerprint(datasets.Dataset.from_dict(rows))
    assert content_fingerprint(first) != content_fingerprint(
        datasets.Dataset.from_dict({"text": ["one", "two", "four"]})
    )
    assert content_fingerprint(first) != content_fingerprint(first.select([0, 1]))


def test_process_pool_without_its_own_writer_returns_results_and_ends_with_a_killed_worker():
    """A worker that is killed amid a large result is in tests/data/test_found.py."""
    pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork"))
    assert pool.submit(abs, -2).result(timeout=seconds(60)) == 2
    descriptor = pool._result_queue._writer.fileno()
    close_own_writer(pool)
    with pytest.raises(OSError, match="descriptor"):
        os.fstat(descriptor)
    assert pool.submit(abs, -3).result(timeout=seconds(60)) == 3
    waiting = pool.submit(time.sleep, 600)
    (worker,) = multiprocessing.active_children()
    worker.kill()
    with pytest.raises(BrokenProcessPool):
        waiting.result(timeout=seconds(60))
    pool.shutdown(wait=True, cancel_futures=True)

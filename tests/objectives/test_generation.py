"""BLEU and ROUGE-L of written answers, against the libraries' own numbers for known texts."""

import numpy as np
import pytest

from trainer.data.store.sequences import Sample
from trainer.evaluation.generation import Generated, first_answer, scores

PAIRS = [
    ("the cat sat on the mat", "the cat sat on the mat today"),
    ("a dog barked at night", "one dog was barking in the night"),
    ("nothing alike", "entirely different words here"),
]


def test_scores_are_those_of_the_libraries():
    import sacrebleu
    from rouge_score import rouge_scorer

    found = scores([Generated(number, answer, reference) for number, (answer, reference) in enumerate(PAIRS)])
    expected = sacrebleu.BLEU().corpus_score([a for a, _ in PAIRS], [[r for _, r in PAIRS]]).score
    assert found["bleu"] == pytest.approx(expected) and 0 < expected < 100
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
    each = [scorer.score(target=reference, prediction=answer)["rougeL"] for answer, reference in PAIRS]
    assert found["rougeL"] == pytest.approx(sum(score.fmeasure for score in each) / 3)
    # By hand: 6 of 6 and 7 words in order; dog, bark and night of 5 and 7; none. (the stem of barking is bark)
    assert found["rougeL"] == pytest.approx((12 / 13 + 2 * 3 / 12 + 0) / 3)


def test_right_answers_have_full_marks():
    found = scores([Generated(0, PAIRS[0][1], PAIRS[0][1])])
    assert found == {"bleu": pytest.approx(100.0), "rougeL": pytest.approx(1.0)}


def test_the_reference_is_the_first_run_of_learned_tokens():
    ids = np.arange(8, dtype=np.int32)
    learned = np.array([0, 0, 1, 1, 0, 0, 1, 0], dtype=bool)
    assert first_answer(Sample(ids, learned)).tolist() == [2, 3]
    assert first_answer(Sample(ids, ids >= 3)).tolist() == [3, 4, 5, 6, 7]

"""Normal form, word n-grams and bands of MinHash values: by hand, and against plain sets of words."""

import random

import numpy as np
import pytest
from rensa import RMinHash, RMinHashLSH

from tests.data.test_duplicates import NEAR, WORDS, plain_ngrams, text_document
from trainer.data.selection.document_hashes import DocumentHasher, normal_digest, normalize
from trainer.data.selection.near_duplicates import MINHASH_SEED, band_recall, choose_bands, ngrams


@pytest.fixture(scope="module")
def corpus():
    draw = random.Random(3)
    return [" ".join(draw.choices(WORDS, k=draw.randint(1, 200))) for _ in range(2000)]


def test_minhash_bands_find_pairs_as_the_formula_says():
    assert choose_bands(0.8) == (18, 7)
    for threshold in (0.3, 0.5, 0.7, 0.8, 0.9, 0.99, 1.0):
        bands, rows = choose_bands(threshold)
        assert bands * rows <= 128 and band_recall(threshold, bands, rows) >= 0.97
        more = rows + 1
        assert more > 128 or band_recall(threshold, 128 // more, more) < 0.97
    draw = random.Random(5)
    expected, hits = 0.0, 0
    for _ in range(500):
        words = draw.choices(WORDS, k=60)
        other = [draw.choice(WORDS) if draw.random() < 0.05 else word for word in words]
        first, second = " ".join(words), " ".join(other)
        index = RMinHashLSH(0.8, 126, 18)
        sketches = [RMinHash(126, MINHASH_SEED) for _ in range(2)]
        for sketch, text in zip(sketches, (first, second), strict=True):
            sketch.update(ngrams(normalize(text)))
        index.insert(0, sketches[0])
        a, b = plain_ngrams(first), plain_ngrams(second)
        expected += band_recall(len(a & b) / len(a | b), 18, 7)
        hits += bool(index.query(sketches[1]))
    assert 150 < expected < 450 and abs(hits - expected) < 40


def test_minhash_columns_are_the_same_for_every_division_into_blocks(corpus):
    documents = [text_document(text) for text in corpus[:300]]
    document_hasher = DocumentHasher(NEAR)
    whole = document_hasher.hash_documents(documents)
    for size in (1, 7, 128):
        parts = [
            document_hasher.hash_documents(documents[start : start + size]) for start in range(0, len(documents), size)
        ]
        for name, column in whole.items():
            assert np.array_equal(column, np.concatenate([part[name] for part in parts])), name


def test_digests_do_not_change_between_versions():
    columns = DocumentHasher(NEAR).hash_documents(
        [text_document("The quick brown fox jumps over the lazy dog, twice.")]
    )
    assert int(columns["normal"][0]) == 0x1EB7CBF3C1A9DD51, "BLAKE2b of the words"


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("What is it?  Yes.", "what is\nit yes", True),
        ("“Well,” she said (quietly)", '"Well", she said [quietly]!', True),
        ("Straße", "STRASSE", True),
        ("caf\u00e9", "cafe\u0301", True),
        ("你好\uff0c世界。", "你好 世界", True),
        ("What is 7 - 3?", "What is 7 * 3?", False),
        ("if x != 1", "if x = 1", False),
        ("3.5", "35", False),
        ("की", "का", False),
        ("x²", "x2", False),
    ],
)
def test_normal_form(first, second, same):
    assert (normal_digest(normalize(first)) == normal_digest(normalize(second))) is same


def test_normal_form_of_ascii_and_of_other_text_is_one():
    text = 'It\'s "5% of A+B" [see: x_y#z|w], ok? Yes!\x07\t**bold** `code` a*b {k: v} <tag/> ~/file'
    padded = normalize(text + " é").split()
    assert padded[:-1] == normalize(text).split() and padded[-1] == "é".encode()


def test_ngrams_by_counting():
    texts = ["a b c d e f g h", "a b", "", "... !", "x x x x x x x x x", "b a"]
    runs = [ngrams(normalize(text)) for text in texts]
    assert [len(one) for one in runs] == [4, 1, 0, 0, 5, 1] and len(set(runs[4])) == 1
    assert not set(runs[1]) & set(runs[5]), "the order of words counts"
    assert not set(runs[0]) & set(ngrams(normalize(texts[0]), label_hash=7))

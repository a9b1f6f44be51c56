from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from trainer.data.tokens import pretokens
from trainer.data.tokens.pretokens import PROBES, RememberedPretokens

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
ENDING = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + ENDING
QWEN2 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + ENDING
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
O200K = (
    r"[^\r\n\p{L}\p{N}]?" + UPPER + "*" + LOWER + "+" + CONTRACTIONS + r"?|[^\r\n\p{L}\p{N}]?" + UPPER + "+" + LOWER
    + "*" + CONTRACTIONS + r"?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)  # fmt: skip
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?" + UPPER + "*" + LOWER + r"+|[^\r\n\p{L}\p{N}]?" + UPPER + "+" + LOWER
    + r"*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)  # fmt: skip
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|im", "<think>"]
CORPUS = [
    *PROBES,
    "the quick brown fox doesn't jump over 1234 lazy dogs; hello world!\n\n",
    "über naïve 😀😀 Жизнь it\u2019s",
]


def split(pattern):
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), byte_level])


def digits(individual):
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=individual), byte_level])


PLAIN = pre_tokenizers.ByteLevel(add_prefix_space=False)
TAKEN = {
    "gpt2": (PLAIN, None),
    "llama3": (split(LLAMA3), None),
    "qwen2": (split(QWEN2), normalizers.NFC()),
    "qwen2-without-nfc": (split(QWEN2), None),
    "smollm2": (digits(True), None),
    "runs-of-digits": (digits(False), None),
    "o200k": (split(O200K), None),
    "tekken": (split(TEKKEN), None),
}


def make(pre_tokenizer, normalizer=None, *, special=SPECIAL, alphabet=True, **model):
    backend = Tokenizer(models.BPE(**model))
    backend.pre_tokenizer, backend.decoder = pre_tokenizer, decoders.ByteLevel()
    if normalizer is not None:
        backend.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=800,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if alphabet else [],
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS * 3, trainer)
    return backend


@cache
def kind(name):
    backend = make(*TAKEN[name], ignore_merges=name == "llama3")
    found = RememberedPretokens.of(backend)
    assert found is not None
    return backend, found


def rust(backend, text):
    return backend.encode(text, add_special_tokens=False).ids


def oracle(backend, text, spans):
    """By the offsets of the tokenizer itself: from the first to the last token with a character of the span."""
    offsets = backend.encode(text, add_special_tokens=False).offsets
    learned = np.zeros(len(offsets), bool)
    for begin, end in spans:
        inside = [i for i, (b, e) in enumerate(offsets) if b < end and e > begin and begin < end]
        if inside:
            learned[inside[0] : inside[-1] + 1] = True
    return learned


CALM = " abcXYZ'sStTlLdD0123456789.,!?-_/\n\r\t\x0b\x0c\x1c\x85\xa0\u200b\u200d\ufe0féßЖя\u2019“…😀👍🏽٣½²Ⅻ한국עǅ"
FRAGMENTS = [
    *SPECIAL,
    "'LL",
    "'ve",
    "  ",
    "\n\n",
    "\r\n",
    "don't",
    " 12345",
    "😀😀",
    "e\u0301",
    "漢字",
    "\u212a",
    "'\u017f",
]
ANY = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
PIECE = st.sampled_from(FRAGMENTS) | st.text(st.sampled_from(CALM), max_size=8) | ANY
TEXT = st.lists(PIECE, max_size=8).map("".join)


@pytest.mark.parametrize("name", TAKEN)
@settings(max_examples=250, deadline=None)
@given(TEXT)
def test_ids_are_the_tokenizers_own(name, text):
    backend, found = kind(name)
    ids = found.encode(text)
    assert ids is None or ids == rust(backend, text)


@pytest.mark.parametrize("name", TAKEN)
@settings(max_examples=100, deadline=None)
@given(st.text(st.sampled_from(CALM), max_size=40))
def test_everyday_characters_are_taken(name, text):
    backend, found = kind(name)
    assert found.encode(text) == rust(backend, text)


@pytest.mark.parametrize("name", TAKEN)
def test_every_character_of_the_basic_plane_alone_and_in_company(name):
    backend, found = kind(name)
    codes = [*range(0xD800), *range(0xE000, 0x10000), *range(0x1F300, 0x1FB00)]
    step = 1 if name in ("gpt2", "qwen2") else 7
    taken = 0
    for begin in range(0, len(codes), 512):
        chunk = [chr(code) for code in codes[begin : begin + 512 : step]]
        chunk = [c for c in chunk if found.encode(c) is not None]
        taken += len(chunk)
        text = "".join(f"a{c}1 {c}{c} {c}\n" for c in chunk)
        assert found.encode(text) == rust(backend, text)
    assert taken > 5000 / step


@pytest.mark.parametrize("name", ["qwen2"])
def test_what_nfc_may_change_is_left_to_the_tokenizer(name):
    _, found = kind(name)
    assert found.encode("é“😀”") is not None
    for text in ("e\u0301", "\u0958", "\u1100\u1161", "\u212b", "\uac00\u11a8", "a\u0315\u031d", "\u0378"):
        assert found.encode(text) is None


@pytest.mark.parametrize("name", ["gpt2", "llama3", "qwen2"])
@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(TEXT, st.lists(st.integers(0, 40), max_size=8)), min_size=1, max_size=5))
def test_masks_are_those_of_the_offsets(name, cases):
    backend, found = kind(name)
    texts = [text for text, _ in cases]
    spans = []
    for text, edges in cases:
        edges = sorted(min(edge, len(text)) for edge in edges[: len(edges) // 2 * 2])
        spans.append(list(zip(edges[::2], edges[1::2], strict=True)))
    for text, inner, pair in zip(texts, spans, found.encode_all(texts, spans), strict=True):
        assert (pair is None) == (found.encode(text) is None)
        if pair is not None:
            assert pair[0].tolist() == rust(backend, text)
            assert pair[1].tolist() == oracle(backend, text, inner).tolist()


def test_a_character_of_several_tokens_is_learned_whole():
    backend = make(PLAIN, special=[])
    found = RememberedPretokens.of(backend)
    text = "a🪐b"  # the corpus has others that begin alike
    ids, learned = found.encode_all([text], [[(1, 2)]])[0]
    assert len(ids) > 3 and learned.tolist() == [False, *[True] * (len(ids) - 2), False]


def test_a_token_that_straddles_an_edge_is_learned():
    backend, found = kind("gpt2")
    (ids, learned) = found.encode_all(["hello world"], [[(8, 11)]])[0]
    at = len(rust(backend, "hello"))
    assert learned.tolist() == [i >= at for i in range(len(ids))] and at < len(ids)


def added(**how):
    backend = make(PLAIN)
    backend.add_tokens([AddedToken("<extra>", **{"normalized": False, **how})])
    return backend


def python_pre_tokenizer():
    backend = make(PLAIN)

    class Words:
        def pre_tokenize(self, text):
            pass

    backend.pre_tokenizer = pre_tokenizers.PreTokenizer.custom(Words())
    return backend


def word_piece():
    backend = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return backend


def unigram():
    backend = Tokenizer(models.Unigram([(c, -1.0) for c in pre_tokenizers.ByteLevel.alphabet()], 0))
    backend.pre_tokenizer = PLAIN
    return backend


def dropout():
    backend = make(PLAIN)
    backend.model.dropout = 0.1
    return backend


def special_as_text():
    backend = make(PLAIN)
    backend.encode_special_tokens = True
    return backend


REFUSED = {
    "metaspace": lambda: make(pre_tokenizers.Metaspace()),
    "none": lambda: make(pre_tokenizers.Sequence([])),
    "prefix-space": lambda: make(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "one-pre-token": lambda: make(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)),
    "unknown-pattern": lambda: make(split(r"\p{L}+|\P{L}+")),
    "merged": lambda: make(pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(QWEN2), "merged_with_next"), PLAIN])),
    "three-steps": lambda: make(pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), digits(True), PLAIN])),
    "nfkc": lambda: make(PLAIN, normalizers.NFKC()),
    "lowercase": lambda: make(PLAIN, normalizers.Lowercase()),
    "no-alphabet": lambda: make(PLAIN, alphabet=False, unk_token="<|im"),
    "byte-fallback": lambda: make(PLAIN, byte_fallback=True),
    "suffix": lambda: Tokenizer(models.BPE({"a": 0}, [], end_of_word_suffix="</w>")),
    "dropout": dropout,
    "special-as-text": special_as_text,
    "python": python_pre_tokenizer,
    "wordpiece": word_piece,
    "unigram": unigram,
    "lstrip": lambda: added(lstrip=True),
    "rstrip": lambda: added(rstrip=True),
    "single-word": lambda: added(single_word=True),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_kinds_are_refused(name):
    assert RememberedPretokens.of(REFUSED[name]()) is None


@pytest.mark.parametrize("content", ["<extra>", "Ⅻ", "<|im_end|>x", "im"])
def test_tokens_looked_for_later_are_taken_where_they_overlap_no_other(content):
    backend = make(PLAIN)
    backend.add_tokens([AddedToken(content, normalized=True)])
    found = RememberedPretokens.of(backend)
    assert (found is not None) == (content in ("<extra>", "Ⅻ"))
    if found is not None:
        text = f"a {content}{content} b<|im_end|>{content[:-1]} <|im{content}"
        assert found.encode(text) == rust(backend, text)
        assert found.encode_all([text], [[]])[0] is not None


def test_a_token_that_spells_a_byte_is_refused():
    backend = make(PLAIN)
    backend.add_tokens([AddedToken("é", normalized=False)])  # in the vocabulary it stands for the byte 0xE9
    assert RememberedPretokens.of(backend) is None


def test_a_difference_on_the_probes_refuses(monkeypatch):
    backend, _ = kind("gpt2")
    monkeypatch.setattr(pretokens, "_GPT2", pretokens._GPT2.replace(" ?", ""))
    assert RememberedPretokens.of(backend) is None


def test_a_text_of_which_a_piece_is_missing_is_left_to_the_tokenizer():
    found = RememberedPretokens.of(kind("gpt2")[0])
    find = found._find_ascii
    found._find_ascii = lambda text: [piece for piece in find(text) if piece != " lost"]
    missing, whole = found.encode_all(["hello lost world", "hello world"], [[(0, 5)], [(6, 11)]])
    assert missing is None and whole[1].any() and not whole[1][0]


def test_memory_is_bounded(monkeypatch):
    backend, _ = kind("gpt2")
    monkeypatch.setattr(pretokens, "MAX_REMEMBERED", 20)
    found = RememberedPretokens.of(backend)
    for number in range(100):
        text = f"word{number} {'x' * 70} hello"
        assert found.encode(text) == found.encode(text) == rust(backend, text)
    assert len(found._memory) <= 20 and all(len(piece) <= 64 for piece in found._memory)


def test_it_survives_a_fork():
    import multiprocessing

    backend, _ = kind("gpt2")
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.map(found_in_fork, ["hello brave new 42 world"]) == [rust(backend, "hello brave new 42 world")]


def found_in_fork(text):
    return kind("gpt2")[1].encode(text)

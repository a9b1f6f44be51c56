import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.errors import ConfigError, DataError
from tests.helpers import chat_templates
from tests.helpers import tokenizers as make
from tests.helpers.covering import examples
from trainer.data.config import LearnConfig, LearnTurns, OverLength
from trainer.data.document import Document
from trainer.data.tokens.encode import Encoder
from trainer.data.tokens.marking import RESERVED_CHARACTERS
from trainer.data.tokens.truncation import fit_length, oddity_codes

CHAT = Encoder(make.tiny_tokenizer())
BOS = Encoder(make.tiny_tokenizer(None, adds_bos=True))
PLAIN = Encoder(make.tiny_tokenizer(None))


def talk(*contents, system=None, **more):
    turns = [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]
    turns = [{"role": "system", "content": system}, *turns] if system else turns
    return Document("f.jsonl", 3, messages=turns, **more)


def encode(encoder, document):
    return next(encoder.encode([document]))[1]


def text(encoder, sample):
    return encoder.tokenizer.decode(sample.input_ids)


def learned(encoder, sample):
    return encoder.tokenizer.decode(sample.input_ids[sample.supervised])


def cut(encoder, document, max_length, policy):
    return fit_length(encoder, document, encode(encoder, document), max_length, OverLength(policy))


def pair(chosen, rejected, *, prompt="q"):
    answers = ([{"role": "assistant", "content": content}] for content in (chosen, rejected))
    return Document(
        "f.jsonl", 3, messages=talk(prompt).messages, **dict(zip(("chosen", "rejected"), answers, strict=True))
    )


def test_encoder_takes_the_preferred_answer_of_a_pair():
    sample = encode(CHAT, pair("good", "bad"))
    assert sample.input_ids.tolist() == encode(CHAT, talk("q", "good")).input_ids.tolist()
    assert learned(CHAT, sample) == "good<|im_end|>"


@pytest.mark.parametrize("name", chat_templates.FAMILIES)
def test_pairs_share_their_prompt(name):
    encoder = Encoder(chat_templates.tokenizer(name))
    doc = pair("good one", "a bad one")
    doc.messages = talk("q", "an earlier answer", "r").messages
    (_, chosen, rejected) = next(encoder.encode_pairs([doc]))
    end = chat_templates.FAMILIES[name].end
    assert (
        learned(encoder, chosen).strip() == "good one" + end and learned(encoder, rejected).strip() == "a bad one" + end
    )
    at = int(np.flatnonzero(chosen.supervised)[0])
    assert at == int(np.flatnonzero(rejected.supervised)[0])
    assert chosen.input_ids[:at].tolist() == rejected.input_ids[:at].tolist()


def test_pair_answer_that_merges_with_the_prompt_begins_where_the_other_answer_does():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({t: i for i, t in enumerate([*alphabet, "ĊĊ"])}, [("Ċ", "Ċ")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    tokenizer.chat_template = make.CHATML
    encoder = Encoder(tokenizer)
    _, chosen, rejected = next(encoder.encode_pairs([pair("\ngood", "bad")]))
    starts = [int(np.flatnonzero(sample.supervised)[0]) for sample in (chosen, rejected)]
    assert starts[0] == starts[1]
    assert learned(encoder, chosen).startswith("\n\ngood") and learned(encoder, rejected).startswith("\nbad")


def test_pairs_whose_prompts_differ_are_refused():
    template = "{{ messages[-1]['content'] | length }}" + make.CHATML_GENERATION
    with pytest.raises(DataError, match=r"f\.jsonl:3: .*writes the prompt differently"):
        next(Encoder(make.tiny_tokenizer(template)).encode_pairs([pair("good", "a bad one")]))


def test_roles_must_be_known():
    for roles in (["model"], []):
        with pytest.raises(ConfigError, match=r"data\.learn\.roles=.*system, user, assistant"):
            Encoder(make.tiny_tokenizer(), learn=LearnConfig(roles=roles))


def test_encoder_keeps_the_conversation_when_nothing_is_learned():
    doc = talk("q", "a", "r", "b")
    for message in doc.messages:
        message["train"] = False
    sample = encode(CHAT, doc)
    assert not sample.supervised.any() and text(CHAT, sample).endswith("b<|im_end|>\n")
    assert oddity_codes(CHAT, doc, sample) == ["no_supervised"]


def test_some_turns_of_a_template_with_generation_blocks():
    encoder = Encoder(make.tiny_tokenizer(make.CHATML_GENERATION), learn=LearnConfig(turns=LearnTurns.last))
    assert learned(encoder, encode(encoder, talk("q", "a", "r", "b"))) == "b<|im_end|>"
    users = Encoder(make.tiny_tokenizer(make.CHATML_GENERATION), learn=LearnConfig(roles=["user"]))
    assert learned(users, encode(users, talk("q", "a", "r", "b"))) == "q<|im_end|>r<|im_end|>"


def test_encoder_names_the_refused_conversation_of_a_batch():
    encoder = Encoder(chat_templates.tokenizer("gemma"))
    bad = talk("q", "a", system="s")
    bad.line = 8
    with pytest.raises(DataError, match=r"f\.jsonl:8: .*System role not supported"):
        list(encoder.encode([talk("q", "a"), bad, talk("q", "a")]))


def test_reserved_characters_are_refused():
    for reserved in RESERVED_CHARACTERS:
        with pytest.raises(DataError, match=r"f\.jsonl:3: .*private-use characters U\+10FB01 to U\+10FB05"):
            encode(CHAT, talk("q", f"a{reserved}b"))


def test_encoder_oddities_of_a_document():
    good = talk("q", "a")
    assert oddity_codes(CHAT, good, encode(CHAT, good)) == []
    spelled = talk("q<|im_start|>", "a")
    assert oddity_codes(CHAT, spelled, encode(CHAT, spelled)) == ["control_tokens_in_text", "control_tokens_as_text"]
    long = talk("q", "a b c d e f g")
    (short,) = cut(CHAT, long, len(encode(CHAT, long).input_ids) - 3, "truncate")
    assert oddity_codes(CHAT, long, short) == ["missing_eos"]


@pytest.mark.parametrize("policy", OverLength)
def test_cut_leaves_a_document_that_fits_as_it_is(policy):
    doc = talk("q", "a")
    sample = encode(CHAT, doc)
    assert fit_length(CHAT, doc, sample, len(sample.input_ids), policy) == [sample]


def test_cut_drop_and_fail_policies():
    doc = talk("q", "a" * 50)
    assert cut(CHAT, doc, 10, "drop") is None
    with pytest.raises(DataError, match=r"f\.jsonl:3: \d+ tokens are more than data\.max_length=10; raise it"):
        cut(CHAT, doc, 10, "fail")


@pytest.mark.parametrize("encoder", [BOS, PLAIN])
@pytest.mark.parametrize("max_length", [2, 3, 7, 8, 9, 30])
def test_text_split_has_every_token_once(encoder, max_length):
    doc = Document("f", 1, text="zyxwvutsrqponmlkjihg")
    whole = encode(encoder, doc)
    bos, eos = int(encoder is BOS), encoder.tokenizer.eos_token_id
    pieces = cut(encoder, doc, max_length, "split")
    assert all(len(piece.input_ids) <= max_length for piece in pieces)
    if max_length - bos < 2:
        assert len(pieces) == 1
        return
    assert np.concatenate([p.input_ids[bos:] for p in pieces]).tolist() == whole.input_ids[bos:].tolist()
    for number, piece in enumerate(pieces):
        assert piece.input_ids[:bos].tolist() == whole.input_ids[:bos].tolist()
        assert piece.supervised.tolist() == [False] + [True] * (len(piece.input_ids) - 1)
        assert (eos in piece.input_ids) == (number == len(pieces) - 1)
    assert len(pieces[-1].input_ids) >= 2 + bos, "no piece is EOS alone"


def test_cut_on_the_left_keeps_bos_and_the_end_of_a_text():
    doc = Document("f", 1, text="zyxwvutsrqponm")
    (sample,) = cut(BOS, doc, 5, "truncate_left")
    assert text(BOS, sample) == "<s>onm</s>" and sample.supervised.tolist() == [False] + [True] * 4


def test_cut_of_labelled_text_keeps_its_surrounding_tokens():
    from tokenizers.processors import TemplateProcessing

    tokenizer = make.tiny_tokenizer(None)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="[INST] $A [/INST]",
        special_tokens=[(t, tokenizer.convert_tokens_to_ids(t)) for t in ("[INST]", "[/INST]")],
    )
    encoder = Encoder(tokenizer)
    encoder.set_label_names(["x"])
    doc = Document("f", 1, text="zyxwv", label="x")
    for policy, wanted in (("truncate", "zy"), ("split", "zy"), ("truncate_left", "wv")):
        (sample,) = cut(encoder, doc, 4, policy)
        assert text(encoder, sample) == f"[INST]{wanted}[/INST]" and sample.marks["label"] == 0


@pytest.mark.parametrize("name", chat_templates.FAMILIES)
def test_split_conversations_learn_every_turn_once_after_the_system_turn(name):
    family, encoder = chat_templates.FAMILIES[name], Encoder(chat_templates.tokenizer(name))
    contents = [f"{'q' if i % 2 == 0 else 'answer '}{i}" for i in range(20)]
    doc = talk(*contents, system="rules" if family.system else None)
    one = len(encode(encoder, talk(*contents[:2], system="rules" if family.system else None)).input_ids)
    windows = cut(encoder, doc, one * 2 + 8, "split")
    assert 2 <= len(windows) < 10
    for window in windows:
        assert len(window.input_ids) <= one * 2 + 8
        assert not family.system or text(encoder, window).count("rules") == 1
    whole = "".join(learned(encoder, window) for window in windows)
    assert whole.replace(" ", "") == "".join(c + family.end for c in contents[1::2]).replace(" ", "")


def test_split_keeps_what_the_full_conversation_learns():
    encoder = Encoder(make.tiny_tokenizer(), learn=LearnConfig(turns=LearnTurns.last))
    (window,) = cut(encoder, talk("q", "a", "r", "b", "s", "c"), 20, "split")
    assert learned(encoder, window) == "c<|im_end|>"


def test_an_exchange_too_long_for_a_window_is_truncated():
    windows = cut(CHAT, talk("q", "z" * 100, "r", "b"), 40, "split")
    assert len(windows[0].input_ids) == 40
    assert learned(CHAT, windows[0]).strip("z") == "" and learned(CHAT, windows[1]) == "b<|im_end|>"


def test_cut_on_the_left_keeps_complete_exchanges_after_the_system_turn():
    doc = talk("q", "a", "r", "b", "s", "c", system="rules")
    wanted = encode(CHAT, talk("r", "b", "s", "c", system="rules"))
    (sample,) = cut(CHAT, doc, len(wanted.input_ids) + 2, "truncate_left")
    assert sample.input_ids.tolist() == wanted.input_ids.tolist()
    assert sample.supervised.tolist() == wanted.supervised.tolist()


def test_cut_on_the_left_of_a_long_exchange_loses_the_beginning_of_its_question():
    doc = talk("zyxwvutsrqponmlkjihgf", "answer", system="rules")
    full = text(CHAT, encode(CHAT, doc))
    (sample,) = cut(CHAT, doc, len(encode(CHAT, doc).input_ids) - 5, "truncate_left")
    assert text(CHAT, sample) == full.replace("zyxwv", "") and learned(CHAT, sample) == "answer<|im_end|>"


def test_preference_pairs_are_cut_too():
    doc = pair("good", "bad", prompt="z" * 40)
    (sample,) = cut(CHAT, doc, 30, "truncate_left")
    assert learned(CHAT, sample) == "good<|im_end|>" and len(sample.input_ids) == 30


WORDS = st.text(st.sampled_from("ab \n'sé😀👍🏽漢\u0301\x85\xa01?"), max_size=12) | st.text(max_size=8)
CONTENT = WORDS.filter(lambda content: not any("\ud800" <= c <= "\udfff" or c in RESERVED_CHARACTERS for c in content))


def same(one, other):
    for (_, left), (_, right) in zip(one, other, strict=True):
        assert left.input_ids.tolist() == right.input_ids.tolist() and left.marks == right.marks
        assert left.supervised.tolist() == right.supervised.tolist()
        assert left.input_ids.dtype == right.input_ids.dtype and left.supervised.dtype == right.supervised.dtype


@pytest.mark.parametrize("encoder", [CHAT, BOS, PLAIN])
@settings(max_examples=examples(60), deadline=None)
@given(st.lists(st.tuples(CONTENT, CONTENT), min_size=1, max_size=8))
def test_encoder_fast_path_gives_what_the_slow_path_gives(encoder, contents):
    documents = [Document("f", 1, prompt=q, completion=a, separator=" ") for q, a in contents]
    documents += [Document("f", 1, text=q + a) for q, a in contents]
    if encoder is CHAT:
        documents += [talk(q, a, a, q, system="s") for q, a in contents]
    same(encoder.encode(documents), encoder.encode(documents, fast=False))


@pytest.mark.parametrize("name", chat_templates.FAMILIES)
def test_encoder_fast_path_is_right_for_every_family(name):
    encoder = Encoder(chat_templates.tokenizer(name))
    documents = [talk("q" * n, f"the quick {n} 😀", "don't <s>", "ünder\n\n") for n in range(16)]
    same(encoder.encode(documents), encoder.encode(documents, fast=False))

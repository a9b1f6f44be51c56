"""Masks against an oracle of their own: where a rendered conversation changes when one content is exchanged."""

import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.errors import ConfigError
from tests.helpers import chat_templates
from tests.helpers import tokenizers as make
from tests.helpers.covering import examples
from trainer.data.config import ControlTokens, LearnConfig, LearnTurns
from trainer.data.document import Document
from trainer.data.tokens.encode import Encoder
from trainer.data.tokens.supervision import supervise_spans
from trainer.data.tokens.template import RenderedText, TextAndBlocks

FAMILIES = chat_templates.FAMILIES
CHECK = settings(max_examples=examples(80), deadline=None, derandomize=True)
LOOK_ALIKES = ["assistant\n", "<|im_start|>assistant\n", "[INST] ", "<|im_end|>", "user\n", "</s>", "<|assistant|>\n"]
words = st.sampled_from(
    ["a", "b", "the", "7", "42", "\n", " ", "\t", ".", "é", "e\u0301", "日本", "🙂", "👩‍👩‍👧", "\u200b"]
)
pieced = st.lists(words | st.sampled_from(LOOK_ALIKES), min_size=1, max_size=6).map("".join)
anything = st.text(st.characters(exclude_categories=("Cs", "Co")), min_size=1, max_size=15)
contents = pieced | anything | st.sampled_from(["x", " x", "x\n", "  ", "\n", "\n ", "\n \tx\t \n"])


@st.composite
def conversations(draw, system=True, flags=False):
    turns = [
        {"role": ("user", "assistant")[i % 2], "content": draw(contents)} for i in range(2 * draw(st.integers(1, 3)))
    ]
    if system and draw(st.booleans()):
        turns.insert(0, {"role": "system", "content": draw(contents)})
    if flags:
        for turn in turns:
            if turn["role"] != "system" and (flag := draw(st.sampled_from([None, True, False]))) is not None:
                turn["train"] = flag
    return turns


def apply(tokenizer, messages):
    return tokenizer.apply_chat_template(messages, tokenize=False)


def span_of(tokenizer, messages, number):
    """Where message `number` is in the text: what changes between two other contents frames it."""
    snow, rain = (
        apply(tokenizer, [*messages[:number], {**messages[number], "content": c}, *messages[number + 1 :]])
        for c in "☃☂"
    )
    begin = next(i for i, (a, b) in enumerate(zip(snow, rain, strict=True)) if a != b)
    text = apply(tokenizer, messages)
    assert text[:begin] == snow[:begin] and text[len(text) - len(snow) + begin + 1 :] == snow[begin + 1 :]
    return text, begin, len(text) - (len(snow) - begin - 1)


def encode_apart(encoder, messages):
    """Ids and offsets of a conversation whose questions spell nothing, piece by piece between the tokens that are meant."""
    hidden = {ord(c): chr(0xE000 + ord(c)) for c in "<|>[]/"}
    shown = {ord(mapped): chr(plain) for plain, mapped in hidden.items()}
    masked = [m if m["role"] == "assistant" else {**m, "content": m["content"].translate(hidden)} for m in messages]
    backend = encoder.tokenizer.backend_tokenizer
    plain = type(backend).from_str(backend.to_str())
    plain.encode_special_tokens = True
    names = {token.content for token in encoder.tokenizer.added_tokens_decoder.values() if token.special}
    ids, offsets, at = [], [], 0
    for part in re.split(
        "(" + "|".join(map(re.escape, sorted(names, key=len, reverse=True))) + ")", apply(encoder.tokenizer, masked)
    ):
        if part in names:
            ids.append(backend.token_to_id(part))
            offsets.append((at, at + len(part)))
        elif part:
            encoding = plain.encode(part.translate(shown), add_special_tokens=False)
            ids += encoding.ids
            offsets += [(at + begin, at + end) for begin, end in encoding.offsets]
        at += len(part)
    return ids, offsets


def oracle(encoder, family, messages, learned, *, apart=False):
    """Token ids and mask of what should be learned, from offsets one token at a time."""
    messages = [{key: m[key] for key in ("role", "content")} for m in messages[: max(learned) + 1]]
    characters = set()
    for number in learned:
        text, begin, end = span_of(encoder.tokenizer, messages, number)
        close = family.end if messages[number]["role"] == "assistant" else family.user_end
        at = text.index(close, end)
        assert not text[end:at].strip()
        characters |= set(range(begin, at + len(close)))
    encoding = encoder.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
    ids, places = encode_apart(encoder, messages) if apart else (encoding.ids, encoding.offsets)
    mask = [any(c in characters for c in range(*offsets)) for offsets in places]
    mask[0] = False
    return ids, mask


def samples(encoder, messages):
    """The sample by the long way, and by the short way once the shape of the conversation is known."""
    doc = Document("f.jsonl", 1, messages=messages)
    slow = next(encoder.encode([doc], fast=False))[1]
    quick = [sample for _, sample in encoder.encode([doc] * 3)]
    for sample in quick:
        assert sample.input_ids.tolist() == slow.input_ids.tolist()
        assert sample.supervised.tolist() == slow.supervised.tolist()
    return quick[-1]


@pytest.mark.parametrize("name", FAMILIES)
@CHECK
@given(data=st.data())
def test_mask_learns_assistant_turns_with_their_end_tokens_and_nothing_else(name, data):
    family, encoder = FAMILIES[name], ENCODERS[name]
    messages = data.draw(conversations(family.system))
    sample = samples(encoder, messages)
    learned = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    ids, mask = oracle(encoder, family, messages, learned)
    assert sample.input_ids.tolist() == ids
    assert sample.supervised.tolist() == mask


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("blank", ["", " ", "\n", "\n ", " \n", "\n \n", "\n\x0b", "\u200b"])
def test_mask_of_blank_answers_is_what_the_template_leaves_of_them(name, blank):
    """Qwen 3 takes line ends from the beginning of the last answer, and leaves the rest."""
    asked = {"role": "user", "content": "q"}
    for answers in ([blank], [blank, "x"], ["x", blank], [blank, blank]):
        messages = [turn for content in answers for turn in (asked, {"role": "assistant", "content": content})]
        learned = [number for number, turn in enumerate(messages) if turn["role"] == "assistant"]
        sample = samples(ENCODERS[name], messages)
        assert (sample.input_ids.tolist(), sample.supervised.tolist()) == oracle(
            ENCODERS[name], FAMILIES[name], messages, learned
        )


@pytest.mark.parametrize(("thought", "shown"), [("x", "<think>\nx\n</think>\n\n"), ("", "<think>\n\n</think>\n\n")])
def test_mask_of_an_answer_that_is_only_a_thought_follows_the_template(thought, shown):
    encoder, asked = ENCODERS["qwen3"], {"role": "user", "content": "q"}
    turn = {"role": "assistant", "content": f"<think>\n{thought}\n</think>\n\n"}
    for messages, expected in (([asked, turn], [shown]), ([asked, turn, asked, turn], ["", shown])):
        sample = samples(encoder, messages)
        learned = encoder.tokenizer.decode(sample.input_ids[sample.supervised])
        assert learned == "".join(f"{part}<|im_end|>" for part in expected)


@pytest.mark.parametrize("name", FAMILIES)
@CHECK
@given(data=st.data())
def test_mask_encodes_control_tokens_in_questions_as_text(name, data):
    family, encoder = FAMILIES[name], APART[name]
    messages = data.draw(conversations(family.system))
    learned = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    sample = samples(encoder, messages)
    ids, mask = oracle(encoder, family, messages, learned, apart=True)
    assert sample.input_ids.tolist() == ids
    assert sample.supervised.tolist() == mask


class Encoders(dict):
    """Of families of templates, by name: each is made when it is asked for, not wherever tests are collected."""

    def __init__(self, control_tokens=ControlTokens.keep, **learn):
        self.settings = {"control_tokens": control_tokens, "learn": LearnConfig(**learn)}

    def __missing__(self, name):
        self[name] = Encoder(chat_templates.tokenizer(name), **self.settings)
        return self[name]


ENCODERS, APART = Encoders(), Encoders(ControlTokens.text)
LAST, USERS, BOTH = Encoders(turns=LearnTurns.last), Encoders(roles=["user"]), Encoders(roles=["user", "assistant"])
WAYS = {"all": ENCODERS, "last": LAST, "users": USERS, "both": BOTH}


@pytest.mark.parametrize("name", FAMILIES)
@settings(CHECK, max_examples=examples(60))
@given(data=st.data())
def test_mask_follows_turns_roles_and_flags(name, data):
    family = FAMILIES[name]
    way = data.draw(st.sampled_from(sorted(WAYS)))
    encoder, messages = WAYS[way][name], data.draw(conversations(family.system, flags=True))
    roles = {"users": ["user"], "both": ["user", "assistant"]}.get(way, ["assistant"])
    if name == "mistral":  # it gives the system turn to every question that is equal to the last one
        for number, turn in enumerate(messages):
            turn["content"] = f"{turn['content']}{number}"
    learned = [i for i, m in enumerate(messages) if m.get("train", m["role"] in roles)]
    learned = learned[-1:] if way == "last" else learned
    sample = samples(encoder, messages)
    if not learned:
        assert not sample.supervised.any()
        return
    ids, mask = oracle(encoder, family, messages, learned)
    assert sample.input_ids.tolist() == ids
    assert sample.supervised.tolist() == mask


@pytest.mark.parametrize("name", FAMILIES)
def test_mask_of_a_known_shape_is_not_rendered_again(name, monkeypatch):
    encoder = Encoder(chat_templates.tokenizer(name))
    turns = ["hello", "one\ntwo", "and 🙂", "three"]
    docs = [
        Document(
            "f",
            n,
            messages=[
                {"role": r, "content": c + str(n)} for r, c in zip(("user", "assistant") * 2, turns, strict=True)
            ],
        )
        for n in range(10)
    ]
    list(encoder.encode(docs[:2]))
    monkeypatch.setattr(encoder.template._span_finder, "_spans_by_marking", lambda *_: pytest.fail("rendered twice"))
    assert all(sample.supervised.any() for _, sample in encoder.encode(docs[2:]))


@pytest.mark.parametrize(
    "rewrite",
    [
        "c.replace('no', 'yes')",
        "c | upper",
        "c.strip('*')",
        "(c + c) if 'twice' in c else c",
        "'' if 'gone' in c else c",
        "c.split('</secret>')[-1]",
    ],
)
def test_mask_of_a_known_shape_is_right_for_a_template_that_looks_into_contents(rewrite):
    template = chat_templates.CHATML.replace("{{ '<|im_start|>'", "{% set c = m['content'] %}{{ '<|im_start|>'")
    template = template.replace(
        "m['content'] + '<|im_end|>", f"(({rewrite}) if m['role'] == 'user' else c) + '<|im_end|>"
    )
    encoder = Encoder(make.tiny_tokenizer(template))
    for question in ("plain", "no", "*a*", "twice", "gone", "a</secret>b", "plain"):
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": "no *matter*"}]
        assert samples(encoder, messages).supervised.any()


def test_mask_notices_a_rewriting_that_keeps_the_length_of_the_text():
    template = chat_templates.CHATML.replace("m['content']", "m['content'].replace('*', '')")
    template += "{{ '!' * (messages[0]['content'].split('*') | length - 1) }}"
    encoder = Encoder(make.tiny_tokenizer(template))
    for question in ("a", "b", "*c*", "*" * 9 + "d"):
        sample = samples(encoder, [{"role": "user", "content": question}, {"role": "assistant", "content": "reply"}])
        assert encoder.tokenizer.decode(sample.input_ids[sample.supervised]) == "reply<|im_end|>"


def test_mask_learns_a_token_across_the_end_of_a_turn():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({t: i for i, t in enumerate([*alphabet, "ĊĊ"])}, [("Ċ", "Ċ")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '\n' }}{% endfor %}"
    encoder = Encoder(tokenizer)
    messages = [
        {"role": r, "content": c} for r, c in zip(("user", "assistant") * 2, ["q", "a🙂\n", "r", "b"], strict=True)
    ]
    sample = samples(encoder, messages)
    assert tokenizer.decode(sample.input_ids[sample.supervised]) == "a🙂\n\nb</s>"


def test_mask_follows_a_template_that_writes_the_date_over_midnight(monkeypatch):
    encoder = Encoder(make.tiny_tokenizer(chat_templates.CHATML))
    doc = Document("f", 1, messages=[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}])
    render, days, calls = encoder.template._render_batch, iter("1122233333333333333333333333"), []

    def dated(conversations, **kwargs):
        calls.append(day := next(days))
        return [TextAndBlocks(day + text, blocks) for text, blocks in render(conversations, **kwargs)]

    monkeypatch.setattr(encoder.template, "_render_batch", dated)
    for _ in range(8):
        sample = next(encoder.encode([doc]))[1]
        assert encoder.tokenizer.decode(sample.input_ids[sample.supervised]) == "a<|im_end|>"
        assert encoder.tokenizer.decode(sample.input_ids)[0] in calls[-4:]
    before = len(calls)
    next(encoder.encode([doc]))
    assert len(calls) == before + 1, "the shape was not learned again"


def test_mask_end_is_not_moved_by_a_content_that_completes_a_token():
    """With nothing between an answer and the next question, what the question begins with is no end of the answer."""
    template = "{% for m in messages %}{{ ('<|user|>' if loop.first else '') + m['content'] }}{% endfor %}"
    encoder = Encoder(make.tiny_tokenizer(template))
    messages = [
        {"role": r, "content": c} for r, c in zip(("user", "assistant") * 2, ["q", "a", "</s>r", "b"], strict=True)
    ]
    samples(encoder, messages)


def _metaspace():
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{n:02X}>" for n in range(256)),
        "▁",
        "a",
        "b",
        "▁a",
        "ab",
        "▁ab",
        "é",
        "▁▁",
    ]
    merges = [("▁", "a"), ("a", "b"), ("▁", "ab"), ("▁", "▁")]
    backend = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, merges, unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", bos_token="<s>")


def _wordpiece():
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["[UNK]", "[SEP]", "a", "b", "##a", "##b", "e", "##e", ".", "日", "本"]
    backend = Tokenizer(models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="[SEP]")


def _composed():
    from tokenizers import normalizers

    tokenizer = make.tiny_tokenizer(None)
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    return tokenizer


@pytest.mark.parametrize("made", [_metaspace, _wordpiece, _composed])
@settings(CHECK, max_examples=examples(200))
@given(prompt=contents, completion=contents)
def test_mask_from_edges_of_spans_is_that_from_all_offsets(made, prompt, completion):
    encoder = ENCODERS.setdefault(made.__name__, Encoder(made()))
    text, begin, end = f"{prompt}{completion}{prompt}", len(prompt), len(prompt + completion)
    encoding = encoder.tokenize([RenderedText(text, [])])[0].encoding
    learned = supervise_spans(encoding, RenderedText(text, [(begin, end)])).supervised
    inside = [n for n, (first, last) in enumerate(encoding.offsets) if first < last and last > begin and first < end]
    assert np.flatnonzero(learned).tolist() == (list(range(inside[0], inside[-1] + 1)) if inside else [])


def test_mask_warns_of_a_tokenizer_whose_merges_contain_a_control_token():
    made = _metaspace()
    kept = json.loads(made.backend_tokenizer.to_str())
    kept["model"]["vocab"] |= {piece: 300 + n for n, piece in enumerate(("</", "s>"))}
    kept["model"]["merges"].append(["</", "s>"])
    encoder = Encoder(
        type(made)(tokenizer_object=type(made.backend_tokenizer).from_str(json.dumps(kept)), eos_token="</s>")
    )
    with pytest.raises(
        ConfigError, match=r"'</s>' cannot be told from its spelling .* data.control_tokens=refuse or keep"
    ):
        list(encoder.encode([Document("f", 1, text="it says </s>")]))


def test_mask_learns_spaces_that_a_post_processor_cuts_off_the_offsets():
    from tokenizers import processors

    tokenizer = make.tiny_tokenizer(None)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    sample = next(Encoder(tokenizer).encode([Document("f", 1, prompt="q", completion="   a   \n b  ")]))[1]
    assert np.flatnonzero(~sample.supervised).tolist() == [0]

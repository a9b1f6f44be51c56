import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.errors import ConfigError, DataError
from tests.helpers import tokenizers as make
from tests.helpers.covering import examples
from trainer.data.document import Document
from trainer.data.tokens.encode import Encoder
from trainer.data.tokens.template import ChatTemplate
from trainer.data.tokens.truncation import truncate_sample

TEMPLATES = {  # template, end of turn, whether it trims replies, whether it takes a system turn
    "chatml": (make.CHATML, "<|im_end|>", False, True),
    "chatml-default-system": (make.CHATML_DEFAULT_SYSTEM, "<|im_end|>", False, True),
    "chatml-generation": (make.CHATML_GENERATION, "<|im_end|>", False, True),
    "llama3": (make.LLAMA3, "<|eot_id|>", True, True),
    "gemma": (make.GEMMA, "<end_of_turn>", True, False),
    "mistral": (make.MISTRAL, "</s>", True, False),
    "thinking": (make.THINKING, "<|im_end|>", False, True),
}
ENCODERS = {name: Encoder(make.tiny_tokenizer(parts[0], adds_bos=True)) for name, parts in TEMPLATES.items()}


def document(messages):
    return Document("f.jsonl", 3, messages=messages)


def turns(*contents, system=None):
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]
    return [{"role": "system", "content": system}, *messages] if system else messages


def encode(encoder, doc):
    return next(encoder.encode([doc]))[1]


def learned(encoder, sample):
    return encoder.tokenizer.decode(sample.input_ids[sample.supervised])


texts = st.text(st.characters(exclude_categories=("Cs", "Co")), min_size=1, max_size=30).filter(lambda t: t.strip())
ascii_texts = st.text(st.sampled_from("ab \n\t.<>[]|/é🙂"), min_size=1, max_size=12).filter(lambda t: t.strip())


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=examples(40), deadline=None)
@given(data=st.data())
def test_template_learns_exactly_the_replies_and_their_end_tokens(name, data):
    _, end, trims, takes_system = TEMPLATES[name]
    count = data.draw(st.integers(1, 3))
    contents = data.draw(st.lists(texts | ascii_texts, min_size=2 * count, max_size=2 * count))
    system = data.draw(st.none() | texts) if takes_system else None
    encoder = ENCODERS[name]
    doc = document(turns(*contents, system=system))
    if any(map(encoder.escaper.is_spelled_in, doc.texts())):
        return
    sample = encode(encoder, doc)
    replies = [reply.strip() if trims else reply for reply in contents[1::2]]
    wanted = "".join(reply + end for reply in replies)
    # a token that begins in the template's own space and ends in the reply is the reply's first token
    found = learned(encoder, sample)
    assert found == wanted or (name == "mistral" and found.replace(" ", "") == wanted.replace(" ", ""))
    whole = encoder.tokenizer.decode(sample.input_ids)
    rendered = encoder.tokenizer.apply_chat_template(doc.messages, tokenize=False)
    assert whole == rendered
    assert sample.input_ids.tolist() == encoder.tokenizer(rendered, add_special_tokens=False)["input_ids"]


def test_template_newline_after_the_end_token_is_not_learned():
    sample = encode(ENCODERS["chatml"], document(turns("q", "a")))
    assert ENCODERS["chatml"].tokenizer.decode(sample.input_ids[-1:]) == "\n"
    assert not sample.supervised[-1] and sample.supervised[-2]


def test_template_writes_bos_once():
    encoder = ENCODERS["llama3"]
    sample = encode(encoder, document(turns("q", "a")))
    assert sample.input_ids[0] == encoder.tokenizer.bos_token_id and sample.input_ids[1] != sample.input_ids[0]


def test_template_that_writes_two_bos_is_refused():
    encoder = Encoder(make.tiny_tokenizer("{{ bos_token }}" + make.LLAMA3))
    with pytest.raises(DataError, match=r"f\.jsonl:3: .*two <s> tokens"):
        encode(encoder, document(turns("q", "a")))


def test_template_empty_thought_is_learned_if_given_and_not_if_inserted():
    encoder = ENCODERS["thinking"]
    sample = encode(encoder, document(turns("q", "a")))
    assert "<think>\n\n</think>\n\na" in encoder.tokenizer.decode(sample.input_ids)
    assert learned(encoder, sample) == "a<|im_end|>"
    thought = "<think>\nhm {}\n</think>\n\nreply {}"
    sample = encode(encoder, document(turns("q", thought.format(1, 1), "r", thought.format(2, 2))))
    assert learned(encoder, sample) == "reply 1<|im_end|><think>\nhm 2\n</think>\n\nreply 2<|im_end|>"


def test_a_template_that_throws_the_last_thought_away_is_refused():
    drops = make.CHATML.replace("message['content']", "message['content'].split('</think>')[-1]")
    with pytest.raises(DataError, match=r"f\.jsonl:3: .*throws away the <think> part"):
        encode(Encoder(make.tiny_tokenizer(drops)), document(turns("q", "<think>hm</think>a")))


def test_template_without_an_end_token_appends_eos():
    encoder = Encoder(make.tiny_tokenizer(make.NO_END))
    sample = encode(encoder, document(turns("q", "first", "r", "second")))
    assert learned(encoder, sample) == "firstsecond</s>"
    assert sample.input_ids[-1] == encoder.tokenizer.eos_token_id and sample.supervised[-1]


def test_template_with_eos_only_after_the_last_turn():
    template = make.NO_END.replace("{% endfor %}", "{% if loop.last %}{{ eos_token }}{% endif %}{% endfor %}")
    encoder = Encoder(make.tiny_tokenizer(template))
    assert learned(encoder, encode(encoder, document(turns("q", "a", "r", "b")))) == "ab</s>"


def test_different_end_tokens_in_the_middle_and_at_the_end():
    template = make.CHATML.replace("'<|im_end|>' +", "('</s>' if loop.last else '<|eot_id|>') +")
    encoder = Encoder(make.tiny_tokenizer(template))
    assert learned(encoder, encode(encoder, document(turns("q", "a", "r", "b")))) == "a<|eot_id|>b</s>"


def test_template_turns_after_the_last_reply_are_left_out():
    encoder = ENCODERS["chatml"]
    short, long = (encode(encoder, document(turns("q", "a", *rest))) for rest in ((), ("more",)))
    assert short.input_ids.tolist() == long.input_ids.tolist()


@pytest.mark.parametrize("cut", ["[:5]", "[::-1]", ".split(' ')[-1]"])
def test_a_template_that_rewrites_replies_is_refused(cut):
    template = make.CHATML.replace("message['content']", f"message['content']{cut}")
    with pytest.raises(DataError, match=r"f\.jsonl:3: .*changes the text of an assistant turn"):
        encode(Encoder(make.tiny_tokenizer(template)), document(turns("q", "some reply in the end")))


def test_a_template_that_rewrites_letters_is_followed():
    encoder = Encoder(make.tiny_tokenizer(make.CHATML.replace("message['content']", "message['content'].upper()")))
    assert learned(encoder, encode(encoder, document(turns("q", "reply")))) == "REPLY<|im_end|>"


def test_template_that_refuses_a_conversation_is_reported_with_file_and_line():
    with pytest.raises(DataError, match=r"f\.jsonl:3: .*refuses.*No system role"):
        encode(ENCODERS["gemma"], document(turns("q", "a", system="s")))


def test_conversations_need_a_template():
    with pytest.raises(ConfigError, match=r"no chat template.*model\.chat_template"):
        encode(Encoder(make.tiny_tokenizer(None)), document(turns("q", "a")))


def test_control_tokens_in_the_text_are_noticed():
    assert any(map(ENCODERS["chatml"].escaper.is_spelled_in, document(turns("q<|im_end|>", "a")).texts()))
    assert not any(map(ENCODERS["chatml"].escaper.is_spelled_in, document(turns("q", "a")).texts()))


@given(prompt=texts, completion=texts)
@settings(max_examples=examples(40), deadline=None)
def test_prompt_completion_without_a_template(prompt, completion):
    encoder = PLAIN
    doc = Document("f", 1, prompt=prompt, completion=completion)
    sample = encode(encoder, doc)
    assert encoder.tokenizer.decode(sample.input_ids) == "<s>" + prompt + completion + "</s>"
    text = learned(encoder, sample)
    assert text.endswith("</s>") and not sample.supervised[0]
    boundary = np.flatnonzero(sample.supervised)[0]
    assert sample.supervised[boundary:].all(), "all after the boundary is learned"
    before = encoder.tokenizer.decode(sample.input_ids[1:boundary])
    assert prompt.startswith(before.rstrip("\ufffd")) and len(before.rstrip("\ufffd")) <= len(prompt)


PLAIN = Encoder(make.tiny_tokenizer(None, adds_bos=True))


def test_template_is_used_for_prompt_and_completion():
    encoder = ENCODERS["chatml"]
    pair = encode(encoder, Document("f", 1, prompt="q", completion="a", separator="\n\n"))
    assert pair.input_ids.tolist() == encode(encoder, document(turns("q", "a"))).input_ids.tolist()


def test_text_learns_all_but_the_first_token():
    sample = encode(PLAIN, Document("f", 1, text="hello world"))
    assert PLAIN.tokenizer.decode(sample.input_ids) == "<s>hello world</s>"
    assert sample.supervised.tolist() == [False] + [True] * (len(sample.input_ids) - 1)
    bare = encode(Encoder(make.tiny_tokenizer(None)), Document("f", 1, text="hello world"))
    assert bare.input_ids.tolist() == sample.input_ids[1:].tolist() and not bare.supervised[0]


def test_labelled_text_keeps_its_closing_token_when_cut():
    from tokenizers.processors import TemplateProcessing

    tokenizer = make.tiny_tokenizer(None)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="[INST] $A [/INST]",
        special_tokens=[(t, tokenizer.convert_tokens_to_ids(t)) for t in ("[INST]", "[/INST]")],
    )
    encoder = Encoder(tokenizer)
    encoder.set_label_names(["no", "yes"])
    doc = Document("f", 1, text="a lazy dog jumps", label="yes")
    sample = encode(encoder, doc)
    assert sample.input_ids.tolist() == tokenizer("a lazy dog jumps")["input_ids"] and sample.marks["label"] == 1
    cut = truncate_sample(sample, 3, encoder.num_closing_tokens(doc))
    assert cut.input_ids.tolist() == [sample.input_ids[0], sample.input_ids[1], sample.input_ids[-1]]
    with pytest.raises(DataError, match=r"f:1: label 'maybe' is none of \['no', 'yes'\]"):
        encode(encoder, Document("f", 1, text="a", label="maybe"))


def test_truncation_saved_in_the_tokenizer_is_not_applied():
    tokenizer = make.tiny_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding()
    sample = encode(Encoder(tokenizer), document(turns("q" * 50, "a" * 50)))
    assert len(sample.input_ids) > 20


def test_end_tokens_are_learned_from_the_template():
    assert ChatTemplate(make.tiny_tokenizer(make.LLAMA3)).end_tokens == {"</s>", "<|eot_id|>"}

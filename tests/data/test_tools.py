import json

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.errors import DataError
from tests.helpers import tokenizers as make
from tests.helpers import tool_templates
from tests.helpers.covering import examples
from tests.helpers.tool_templates import FAMILIES, LLAMA31, MISTRAL3, QWEN25
from trainer.data.config import DataFormat, LearnConfig, Reasoning
from trainer.data.document import Document, RejectedRow, SourceRow, message_texts
from trainer.data.formats import RowReader
from trainer.data.selection.document_hashes import content_json
from trainer.data.store.documents import DOCUMENTS_FILE, DocumentTable, document_schema, to_record_batch
from trainer.data.tokens.encode import Encoder

TOOLS = [{"type": "function", "function": {
    "name": "weather", "description": "Now.", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}
}}]  # fmt: skip
CITY = {"city": 'Köln "am" Rhein', "days": 3}


def call(arguments=CITY, name="weather", **own):
    return {**own, "type": "function", "function": {"name": name, "arguments": arguments}}


def talk(*calls, content=None, after=()):
    results = [{"role": "tool", "content": f'{{"degrees": {n}}}', "tool_call_id": c["id"]} for n, c in enumerate(calls)]
    return [
        {"role": "user", "content": "How warm?"},
        {"role": "assistant", "content": content, "tool_calls": list(calls)},
        *results,
        {"role": "assistant", "content": "Warm."},
        *after,
    ]


def read(fields, format=DataFormat.messages, **options):
    found = RowReader(format, {}, source="data", **options)(SourceRow("f.jsonl", 3, fields, ()))
    assert isinstance(found, Document), found
    return found


def document(messages, tools=TOOLS):
    return read({"messages": messages, **({"tools": tools} if tools else {})})


def spans(encoder, doc):
    """Runs of learned tokens, decoded."""
    sample = next(encoder.encode([doc]))[1]
    runs, last = [], -2
    for place, (token, learned) in enumerate(zip(sample.input_ids, sample.supervised, strict=True)):
        if learned:
            runs += [[token]] if place > last + 1 else []
            runs[-1] += [] if place > last + 1 else [token]
            last = place
    return [encoder.tokenizer.decode(run) for run in runs]


def rendered(encoder, doc):
    return encoder.tokenizer.decode(next(encoder.encode([doc]))[1].input_ids)


def encoder(name, reasoning=Reasoning.learn):
    return Encoder(tool_templates.tokenizer(name), learn=LearnConfig(reasoning=reasoning))


ARGUMENTS = json.dumps(CITY, ensure_ascii=False)
QWEN_CALL = f'<tool_call>\n{{"name": "weather", "arguments": {ARGUMENTS}}}\n</tool_call>'
LEARNED = {
    "qwen2.5": [QWEN_CALL + "<|im_end|>", "Warm.<|im_end|>"],
    "qwen3": [QWEN_CALL + "<|im_end|>", "Warm.<|im_end|>"],
    "hermes": [QWEN_CALL + "<|im_end|>", "Warm.<|im_end|>"],
    "llama3.1": [f'{{"name": "weather", "parameters": {ARGUMENTS}}}<|eot_id|>', "Warm.<|eot_id|>"],
    "mistral3": [f'[TOOL_CALLS] [{{"name": "weather", "arguments": {ARGUMENTS}, "id": "abcdefgh1"}}]</s>', "Warm.</s>"],
    "deepseek-r1": [f"<call>function<sep>weather\n```json\n{ARGUMENTS}\n```</call></s>", "Warm.</s>"],
    "gpt-oss": [f" to=functions.weather<|channel|>commentary json<|message|>{ARGUMENTS}<|call|>", "Warm.<|return|>"],
}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("as_text", [False, True])
def test_tool_calls_are_learned_and_tool_results_are_not(name, as_text):
    arguments = ARGUMENTS if as_text else CITY
    doc = document(talk(call(arguments, id="abcdefgh1")))
    assert doc.messages[1]["tool_calls"][0]["function"]["arguments"] == CITY
    made = encoder(name)
    found = [run.removeprefix(" ") if name != "gpt-oss" else run for run in spans(made, doc)]
    assert found == LEARNED[name]
    text = rendered(made, doc)
    assert "degrees" in text and "weather" in text
    if name != "deepseek-r1":  # which tests for a null content that transformers takes out on the way
        assert text == made.tokenizer.apply_chat_template(doc.messages, tools=TOOLS, tokenize=False)


BLOCK = "{% generation %}", "{% endgeneration %}"
BLOCKS = {  # the same templates with {% generation %} around what a model writes
    "qwen2.5": (
        QWEN25.replace("{{- message.content + '<|im_end|>' + '\\n' }}", "{%- if message.role == 'assistant' %}{% generation %}"
        "{{- message.content + '<|im_end|>' }}{% endgeneration %}{{- '\\n' }}{%- else %}{{- message.content + '<|im_end|>\\n' }}"
        "{%- endif %}")
        .replace("{{- '<|im_start|>' + message.role }}{%- if message.content %}{{- '\\n' + message.content }}{%- endif %}",
        "{{- '<|im_start|>' + message.role + '\\n' }}{% generation %}{%- if message.content %}{{- message.content + '\\n' }}"
        "{%- endif %}")
        .replace("{{- '\\n<tool_call>", "{{- ('' if loop.first else '\\n') + '<tool_call>")
        .replace("{%- endfor %}{{- '<|im_end|>\\n' }}{%- elif",
        "{%- endfor %}{{- '<|im_end|>' }}{% endgeneration %}{{- '\\n' }}{%- elif")
    ),
    "llama3.1": LLAMA31.replace("<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}",
        "<|end_header_id|>\\n\\n' }}{%- if message.role == 'assistant' %}{% generation %}{{- message['content'] | trim + "
        "'<|eot_id|>' }}{% endgeneration %}{%- else %}{{- message['content'] | trim + '<|eot_id|>' }}{%- endif %}")
        .replace("{{- '{\"name\"", "{% generation %}{{- '{\"name\"")
        .replace("{{- '<|eot_id|>' }}{%- elif", "{{- '<|eot_id|>' }}{% endgeneration %}{%- elif"),
    "mistral3": MISTRAL3.replace("{{- '[TOOL_CALLS] [' }}", "{% generation %}{{- '[TOOL_CALLS] [' }}")
        .replace("{%- endfor %}{%- elif message['role'] == 'assistant' %}{{- ' ' + message['content']|trim + eos_token }}",
        "{%- endfor %}{% endgeneration %}{%- elif message['role'] == 'assistant' %}{% generation %}"
        "{{- ' ' + message['content']|trim + eos_token }}{% endgeneration %}"),
}  # fmt: skip
texts = st.text(st.characters(exclude_categories=("Cs", "Co", "Cc")), min_size=1, max_size=12).filter(str.strip)
values = st.recursive(
    texts | st.integers(-9, 9) | st.booleans() | st.none(), lambda v: st.lists(v, max_size=2), max_leaves=4
)
calls = st.builds(call, st.dictionaries(texts, values, max_size=3), texts)
asked = st.builds(lambda content: {"role": "user", "content": content}, texts)


@pytest.mark.parametrize("name", BLOCKS)
@settings(max_examples=examples(60), deadline=None)
@given(data=st.data())
def test_tool_masks_are_those_of_generation_blocks(name, data):
    """Blocks written into the template by hand, and found by transformers, mark the tokens that marks find without them."""
    messages = []
    for turn in range(data.draw(st.integers(1, 2))):
        drawn = data.draw(st.lists(calls, min_size=1, max_size=2 if FAMILIES[name].parallel else 1))
        made = [{**c, "id": f"abcdefg{turn}{n}"} for n, c in enumerate(drawn)]
        content = data.draw(st.none() | texts) if name == "qwen2.5" else None
        messages += [data.draw(asked), *talk(*made, content=content)[1:]]
        if data.draw(st.booleans()):  # another call before it answers
            again = {**data.draw(calls), "id": f"abcdefg{turn}9"}
            messages[-1:] = talk(again)[1:]
    if name == "mistral3":  # it finds the last question by comparing
        messages = [
            {**m, "content": f"{m['content']}{n}"} if m["role"] == "user" else m for n, m in enumerate(messages)
        ]
    doc, plain = document(messages), encoder(name)
    if any(map(plain.escaper.is_spelled_in, doc.texts())):
        return
    sample = next(plain.encode([doc]))[1]
    blocks = tool_templates.tokenizer(name)
    found = blocks.apply_chat_template(
        doc.messages, tools=TOOLS, chat_template=BLOCKS[name], return_assistant_tokens_mask=True, return_dict=True
    )
    assert sample.input_ids.tolist() == found["input_ids"]
    wanted = [bool(x) for x in found["assistant_masks"]]
    space = [
        bool(m) and not s and plain.tokenizer.decode([t]) == " "
        for t, m, s in zip(sample.input_ids, wanted, sample.supervised, strict=True)
    ]  # the space that Mistral writes before answers
    assert [bool(s) or p for s, p in zip(sample.supervised, space, strict=True)] == wanted
    assert name == "mistral3" or not any(space)


@pytest.mark.parametrize("name", [name for name in FAMILIES if FAMILIES[name].parallel])
def test_tool_calls_in_parallel_are_one_learned_turn(name):
    doc = document(talk(call(id="abcdefgh1"), call({"city": "Bonn"}, id="abcdefgh2")))
    first, last = spans(encoder(name), doc)
    assert first.count("weather") == 2 and "Bonn" in first and "degrees" not in first and "Warm" in last


@pytest.mark.parametrize("name", [name for name in FAMILIES if not FAMILIES[name].parallel])
def test_tool_template_that_takes_one_call_at_a_time_refuses_two(name):
    with pytest.raises(
        DataError, match=r"f\.jsonl:3: (the chat template refuses|this chat template cannot write tool calls)"
    ):
        spans(encoder(name), document(talk(call(id="abcdefgh1"), call(id="abcdefgh2"))))


@pytest.mark.parametrize("name", FAMILIES)
def test_tool_call_ids_that_a_row_lacks_are_made_and_results_answer_them(name):
    turns = talk(call(id="abcdefgh1"))
    del turns[1]["tool_calls"][0]["id"], turns[2]["tool_call_id"]
    assert "weather" in spans(encoder(name), document(turns))[0]


BROKEN = {
    "tools": (make.CHATML, talk()[:1] + talk()[-1:], "ignores the column tools"),
    "calls": (QWEN25.replace("call in message.tool_calls", "call in []"), talk(call(id="abcdefgh1")), "cannot write tool calls"),
    "results": (QWEN25.replace("message.content + '\\n</tool_response>", "'\\n</tool_response>"), talk(call(id="a")),
        "leaves out the results"),
    "beside": (LLAMA31, talk(call(id="abcdefgh1"), content="Let me see."), "leaves out what turn 2 says beside its calls"),
    "roles": (make.MISTRAL, talk(call(id="abcdefgh1")), "refuses the conversation: .*; .* another in model.chat_template"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_tool_content_that_a_template_leaves_out_is_an_error_with_its_place(name):
    template, messages, said = BROKEN[name]
    with pytest.raises(DataError, match=rf"f\.jsonl:3: .*chat template .*{said}"):
        spans(Encoder(make.tiny_tokenizer(template)), document(messages, TOOLS if name != "roles" else None))


def test_plain_turns_beside_tools_are_masked_as_without_tools():
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}] * 2
    made = encoder("qwen2.5")
    assert spans(made, document(turns)) == spans(made, document(turns, None)) == ["a<|im_end|>"] * 2


def test_tool_turns_are_learned_only_where_asked_for():
    turns = talk(call(id="abcdefgh1"))
    turns[1]["train"] = False
    assert spans(encoder("qwen3"), document(turns)) == ["Warm.<|im_end|>"]
    last = Encoder(tool_templates.tokenizer("qwen3"), learn=LearnConfig(roles=["user", "assistant"]))
    assert spans(last, document(talk(call(id="abcdefgh1"))))[0] == "How warm?<|im_end|>"


# ---- thoughts ----

THOUGHT = "It asks for now."
FIELD = {"role": "assistant", "content": "Warm.", "reasoning_content": THOUGHT}
INLINE = {"role": "assistant", "content": f"<think>\n{THOUGHT}\n</think>\n\nWarm."}
THOUGHTS = f"<think>\n{THOUGHT}\n</think>\n\n"
USER = {"role": "user", "content": "How warm?"}


def thinking(name, reasoning):
    if name == "r1":
        made = make.tiny_tokenizer(tool_templates.R1_KEEPS, adds_bos=True)
        made.add_tokens(list(FAMILIES["deepseek-r1"].tokens), special_tokens=True)
        return Encoder(made, learn=LearnConfig(reasoning=reasoning))
    return encoder(name, reasoning)


@pytest.mark.parametrize(
    ("name", "turn", "learned", "context"),
    [
        ("qwen3", FIELD, THOUGHTS + "Warm.<|im_end|>", "Warm.<|im_end|>"),
        ("qwen3", INLINE, THOUGHTS + "Warm.<|im_end|>", "Warm.<|im_end|>"),
        ("qwen2.5", INLINE, THOUGHTS + "Warm.<|im_end|>", "Warm.<|im_end|>"),
        ("r1", FIELD, THOUGHTS.removeprefix("<think>\n") + "Warm.</s>", "Warm.</s>"),
        (
            "gpt-oss",
            FIELD,
            f"<|channel|>analysis<|message|>{THOUGHT}<|end|><|start|>assistant<|channel|>final<|message|>Warm.<|return|>",
            "Warm.<|return|>",
        ),
    ],
)
def test_thoughts_are_learned_shown_or_dropped(name, turn, learned, context):
    doc = document([USER, turn], None)
    assert spans(thinking(name, Reasoning.learn), doc) == [learned]
    shows = thinking(name, Reasoning.context)
    assert spans(shows, doc) == [context] and THOUGHT in rendered(shows, doc)
    drops = thinking(name, Reasoning.drop)
    assert spans(drops, doc) == [context] and THOUGHT not in rendered(drops, doc)
    without = document([USER, {"role": "assistant", "content": "Warm."}], None)
    assert rendered(drops, doc) == rendered(thinking(name, Reasoning.learn), without)


def test_empty_thought_of_the_template_is_not_learned_and_earlier_thoughts_follow_it():
    made = encoder("qwen3")
    assert spans(made, document([USER, {"role": "assistant", "content": "Warm."}], None)) == ["Warm.<|im_end|>"]
    doc = document([USER, FIELD, USER, {**FIELD, "content": "Still."}], None)
    assert spans(made, doc) == ["Warm.<|im_end|>", THOUGHTS + "Still.<|im_end|>"]
    assert rendered(made, doc).count(THOUGHT) == 1


def test_thought_before_a_tool_call_is_learned_with_it_or_shown():
    turns = talk(call(id="abcdefgh1"))
    turns[1]["reasoning_content"] = THOUGHT
    doc = document(turns)
    assert spans(encoder("qwen3"), doc)[0] == THOUGHTS + QWEN_CALL + "<|im_end|>"
    assert spans(encoder("qwen3", Reasoning.context), doc)[0] == QWEN_CALL + "<|im_end|>"
    assert THOUGHT not in rendered(encoder("qwen3", Reasoning.drop), doc)
    bare = document(talk(call(id="abcdefgh1"))[:2])  # as the last turn it gets an empty thought, which is not learned
    assert "<think>\n\n</think>" in rendered(encoder("qwen3"), bare)
    assert spans(encoder("qwen3"), bare) == [QWEN_CALL + "<|im_end|>"]
    inline = document([turns[0], {**turns[1], "content": THOUGHTS, "reasoning_content": None}, *turns[2:]])
    assert spans(encoder("qwen3"), inline)[0] == THOUGHTS + QWEN_CALL + "<|im_end|>"


@pytest.mark.parametrize(("name", "turn"), [("qwen2.5", FIELD), ("deepseek-r1", FIELD), ("deepseek-r1", INLINE)])
@pytest.mark.parametrize("reasoning", [Reasoning.learn, Reasoning.context])
def test_a_template_that_throws_away_the_last_thought_is_an_error(name, turn, reasoning):
    with pytest.raises(DataError, match=r"f\.jsonl:3: .*throws away the (<think> part|thought)"):
        spans(encoder(name, reasoning), document([USER, turn], None))
    assert spans(encoder(name, Reasoning.drop), document([USER, turn], None))


def test_a_thought_in_a_generation_block_is_shown_only():
    template = make.CHATML_GENERATION
    made = Encoder(make.tiny_tokenizer(template), learn=LearnConfig(reasoning=Reasoning.context))
    assert spans(made, document([USER, INLINE, USER, INLINE], None)) == ["Warm.<|im_end|>"] * 2


def test_turn_that_is_only_a_thought_cannot_be_dropped():
    with pytest.raises(DataError, match=r"f\.jsonl:3: .*data\.learn\.reasoning=drop leaves nothing"):
        spans(encoder("qwen3", Reasoning.drop), document([USER, {"role": "assistant", "content": THOUGHTS}], None))


# ---- rows ----


def test_tool_rows_of_glaive_and_openai_are_the_same_document():
    bare = [tool["function"] for tool in TOOLS]
    glaive = read(
        {
            "conversations": [
                {"from": "human", "value": "How warm?"},
                {"from": "function_call", "value": json.dumps({"name": "weather", "arguments": CITY})},
                {"from": "observation", "value": '{"degrees": 0}'},
                {"from": "gpt", "value": "Warm."},
            ],
            "tools": json.dumps(bare),
        },
        DataFormat.sharegpt,
    )
    turns = talk(call(ARGUMENTS, id="x"))
    del turns[1]["tool_calls"][0]["id"], turns[2]["tool_call_id"]
    assert content_json(glaive) == content_json(document(turns))


def test_tool_rows_of_hermes_stay_texts_and_nothing_is_written_twice():
    hermes = [
        {"from": "system", "value": f"<tools>{json.dumps(TOOLS)}</tools>"},
        {"from": "human", "value": "How warm?"},
        {"from": "gpt", "value": QWEN_CALL},
        {"from": "tool", "value": '<tool_response>\n{"degrees": 3}\n</tool_response>'},
        {"from": "gpt", "value": "Warm."},
    ]
    doc = read({"conversations": hermes, "tools": json.dumps(TOOLS)}, DataFormat.sharegpt)
    made = encoder("qwen2.5")
    assert doc.tools is None and spans(made, doc) == LEARNED["qwen2.5"]
    assert rendered(made, doc).count("<tool_response>") == 1
    assert read({"conversations": hermes[1:], "tools": json.dumps(TOOLS)}, DataFormat.sharegpt).tools == TOOLS


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"tools": 5}, "bad_tools"),
        ({"tools": "no json"}, "bad_tools"),
        ({"tools": [{"description": "nameless"}]}, "bad_tools"),
        (
            {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [{"arguments": CITY}]}]},
            "bad_tool_calls",
        ),
        ({"messages": [USER, {"role": "assistant", "content": "", "tool_calls": "f()"}]}, "bad_tool_calls"),
        ({"messages": [{**USER, "tool_calls": [call()]}, FIELD]}, "turn_tool_calls"),
        ({"messages": [USER, {**INLINE, "reasoning_content": "other"}]}, "two_thoughts"),
        ({"messages": [USER, {"role": "tool", "content": "3", "train": True}, FIELD]}, "bad_train"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "not_text"),
    ],
)
def test_rows_with_broken_calls_are_rejected(change, reason):
    found = RowReader(DataFormat.messages, {}, source="data")(
        SourceRow("f", 1, {"messages": [USER, FIELD], **change}, ())
    )
    assert isinstance(found, RejectedRow) and found.reason == reason


def test_tool_argument_that_is_called_function_is_a_text():
    plot = call({"function": "sin(x)", "style": {"function": "dashed", "width": 2}}, name="plot")
    assert message_texts({"role": "assistant", "content": "", "tool_calls": [plot]}) == ["sin(x)", "dashed"]


def test_tool_arguments_that_are_no_json_stay_as_they_are():
    doc = document(talk(call("city=Bonn", id="abcdefgh1")))
    assert doc.messages[1]["tool_calls"][0]["function"]["arguments"] == "city=Bonn"
    assert '"arguments": city=Bonn}' in spans(encoder("qwen3"), doc)[0]


def test_texts_of_arguments_and_thoughts_are_cleaned_and_stored(tmp_path):
    turns = talk(call({"to": "a@b.org", "cc": ["c@d.org", 3], "n": 1}, id="abcdefgh1"))
    turns[1]["reasoning_content"] = "ask a@b.org"
    doc = document(turns)
    assert doc.texts() == ["How warm?", "ask a@b.org", "a@b.org", "c@d.org", '{"degrees": 0}', "Warm."]
    doc.map_texts(lambda text: text.replace("@", " at "))
    assert "@" not in content_json(doc)
    assert doc.messages[1]["tool_calls"][0]["function"]["arguments"] == {
        "to": "a at b.org",
        "cc": ["c at d.org", 3],
        "n": 1,
    }
    writer = pa.ipc.new_stream(str(tmp_path / DOCUMENTS_FILE), document_schema())
    writer.write_batch(to_record_batch([doc, read({"messages": [USER, {"role": "assistant", "content": "a"}]})]))
    writer.close()
    back = DocumentTable(tmp_path)
    assert back.document(0) == doc and back.document(1).tools is None
    assert back.document(1).messages[1] == {"role": "assistant", "content": "a"}


def test_tool_rows_that_only_a_template_can_write_are_refused_by_encoder_decoders():
    from trainer.objectives.seq2seq import prompt_and_answer

    for doc in (document([USER, {"role": "assistant", "content": "a"}]), document([USER, FIELD], None)):
        with pytest.raises(DataError, match=r"f\.jsonl:3: .*objective=seq2seq has none"):
            prompt_and_answer(doc)


def test_a_run_prepares_and_shows_tools(tmp_path, monkeypatch, capsys):
    from launch.main import main
    from tests.helpers.models import tiny_model_dir

    make.tiny_tokenizer(QWEN25).save_pretrained(tiny_model_dir(tmp_path / "model"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own"))
    monkeypatch.chdir(tmp_path)
    rows = [{"messages": talk(call({"city": f"Köln {n}"}, id="abcdefgh1")), "tools": TOOLS} for n in range(6)]
    make.write_jsonl(tmp_path / "train.jsonl", rows)
    words = ["model.path=model", "data.cache_dir=cache", "data.path=train.jsonl"]
    assert main(["prepare", *words]) == 0
    said = capsys.readouterr().out
    assert '⟦<tool_call>\n{"name": "weather", "arguments": {"city": "Köln 0"}}\n</tool_call><|im_end|>⟧' in said
    (entry,) = (tmp_path / "cache").glob("*/manifest.json")
    assert main(["prepare", "--print", str(entry.parent), "documents=true", "lines=99", "find=Köln 3"]) == 0
    said = capsys.readouterr().out
    assert "tool_calls" in said and '"city": "Köln 3"' in said and "# Tools" in said and "Köln 2" not in said

"""Rows lost for any cause count against one bound, and every one of them can be read in the quarantine file."""

import json
from types import SimpleNamespace

import pytest

from strategies.base import SingleConfig
from strategies.errors import ConfigError, DataError
from tests.helpers import tokenizers as make
from tests.helpers.tokenizers import chat_rows, tiny_tokenizer, write_jsonl
from trainer.data.config import ControlTokens, DataConfig, DuplicatePolicy, DuplicatesConfig, FilterConfig, OverLength
from trainer.data.objective_spec import DataSpec
from trainer.data.prepare import Preparation
from trainer.data.report.preview import summary_text
from trainer.data.tokens.marking import RESERVED_CHARACTERS
from trainer.model.config import ModelConfig
from trainer.objectives.kto import RatedDataSpec
from trainer.objectives.pairs import PairDataSpec
from trainer.objectives.registry import FAMILIES
from trainer.objectives.seq2seq import TwoSidedDataSpec
from trainer.objectives.sft import SftDataSpec
from trainer.tuning.base import FullConfig

AROUND = SimpleNamespace(model=ModelConfig(path="m"), tuning=FullConfig(), strategy=SingleConfig())


def talk(question, answer, *, system=None):
    turns = [{"role": "system", "content": system}] if system else []
    return {"messages": [*turns, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def prepare(tmp_path, rows, tokenizer=None, data_spec=None, **settings):
    write_jsonl(tmp_path / "train.jsonl", rows)
    config = DataConfig(path=str(tmp_path / "train.jsonl"), cache_dir=str(tmp_path / "cache"), **settings)
    return Preparation(config, tokenizer or tiny_tokenizer(), data_spec or DataSpec(), seed=1).open_or_prepare()


def quarantined(made):
    return json.loads((made.directory / "audit.json").read_text())["quarantine"]["rows"]


def test_lost_rows_of_every_cause_count_against_one_bound(tmp_path):
    gemma = tiny_tokenizer(make.GEMMA)
    rows = [
        *chat_rows(15),
        {"messages": [{"role": "user", "content": "x"}]},
        talk("q", "a", system="the template knows no system turn"),
        talk(f"q{RESERVED_CHARACTERS[0]}", "a"),
        talk("fox " * 200, "nothing of this is left"),
        {"messages": [{"role": "user", "content": "<s>q"}, {"role": "assistant", "content": "a"}]},
    ]
    causes = {16: "no_assistant_turn", 17: "refused_by_template", 18: "reserved_character", 19: "nothing_to_learn"}
    with pytest.raises(DataError) as caught:
        prepare(tmp_path, rows, gemma, max_length=150, max_bad_share=0.1)
    said = str(caught.value)
    assert said.startswith("4 of 20 rows cannot be used (") and "more than data.max_bad_share=0.1 allows" in said
    assert all(f"{reason} 1" in said and f"train.jsonl:{line}: " in said for line, reason in causes.items())
    assert "No system role" in said and "raise data.max_length or set data.over_length=split" in said
    assert said.endswith("data.max_bad_share=0.2"), "what is advised is enough, see below"
    listed = [json.loads(line) for path in (tmp_path / "cache" / "rejected").iterdir() for line in path.open()]
    assert {row["line"]: row["reason"] for row in listed} == causes

    made = prepare(tmp_path, rows, gemma, max_length=150, max_bad_share=0.2)
    kept = [json.loads(line) for line in (made.directory / "quarantine.jsonl").open()]
    assert sorted(kept, key=str) == sorted(listed, key=str) and all(row["message"] and row["excerpt"] for row in kept)
    assert len(made.train) == made.report["conserved"]["kept"] == 16, "one refusal loses nothing else of its batch"
    first = summary_text(made.report).splitlines()[0]
    assert first == "rows: 20 rows read = 16 kept + 4 dropped (20.0% lost)"
    page = (made.directory / "audit.html").read_text()
    assert "4 rows could not be used" in page and "<b>20.0% of the rows are lost</b>" in page
    whole = prepare(tmp_path, rows[:15], gemma)
    for number in range(15):
        assert made.train.sample(number).input_ids.tolist() == whole.train.sample(number).input_ids.tolist()
        assert made.train.sample(number).supervised.tolist() == whole.train.sample(number).supervised.tolist()


def test_lost_rows_by_two_bos_are_the_documents_that_have_them(tmp_path):
    begins = tiny_tokenizer(
        "{{ bos_token }}{% for message in messages %}{{ message['content'] + eos_token }}{% endfor %}"
    )
    made = prepare(
        tmp_path, [talk("<s>q", "a"), *chat_rows(3)], begins, max_bad_share=0.25, control_tokens=ControlTokens.keep
    )
    (row,) = [json.loads(line) for line in (made.directory / "quarantine.jsonl").open()]
    assert row["line"] == 1 and row["reason"] == "doubled_bos" and "two <s> tokens" in row["message"]


def test_lost_rows_with_nothing_left_to_learn_are_an_error_beyond_the_bound(tmp_path):
    rows = [*chat_rows(31), *(talk("fox " * 100 + str(n), "a") for n in range(13))]
    with pytest.raises(DataError) as caught:
        prepare(tmp_path, rows, max_length=100)
    said = str(caught.value)
    assert said.startswith("13 of 44 rows cannot be used (nothing_to_learn 13), more than data.max_bad_share=0 allows")
    assert "no supervised token is within data.max_length=100" in said and "... and 12 more like it" in said
    assert "data.over_length=split" in said and said.endswith("data.max_bad_share=0.3")
    assert quarantined(prepare(tmp_path, rows, max_length=100, max_bad_share=0.3)) == 13


@pytest.mark.parametrize(
    "data_spec", [DataSpec(), SftDataSpec(), PairDataSpec(), RatedDataSpec()], ids=lambda r: type(r).__name__
)
def test_lost_rows_advice_names_what_the_objective_takes(tmp_path, data_spec):
    long = "fox " * 100
    rows = [{"prompt": p, "chosen": "a", "rejected": "b"} for p in ("q", long)]
    if isinstance(data_spec, RatedDataSpec):
        rows = [
            {"prompt": p, "completion": "a", "label": good} for p, good in (("q", True), ("q", False), (long, True))
        ]
    with pytest.raises(DataError, match="nothing_to_learn 1") as caught:
        prepare(tmp_path, rows, data_spec=data_spec, max_length=100)
    assert ("set data.over_length=split" in str(caught.value)) is (OverLength.split in data_spec.over_length)
    assert "; raise data.max_length" in str(caught.value)
    with pytest.raises(DataError, match="nothing_to_learn 1") as caught:
        prepare(tmp_path, rows, max_length=100, over_length=OverLength.split)
    assert "set data.over_length=split" not in str(caught.value), "it is set"
    with pytest.raises(DataError, match=r"more than data\.max_length=100") as caught:
        prepare(tmp_path, rows, data_spec=data_spec, max_length=100, over_length=OverLength.fail)
    named = str(caught.value).rpartition("data.over_length to ")[2]
    assert {*named.replace(" or ", ", ").split(", ")} == {policy.value for policy in data_spec.over_length} - {"fail"}


@pytest.mark.parametrize("name", FAMILIES)
def test_objectives_take_the_policies_that_their_rules_allow(name):
    """The one list says what is advised and what is refused."""
    config = FAMILIES[name].settings()
    for policy in OverLength:
        around = SimpleNamespace(**{**vars(AROUND), "data": DataConfig(over_length=policy)})
        refused = any(line.startswith("data.over_length") for line in FAMILIES[name].problems(config, around))
        assert refused is (policy not in FAMILIES[name].data_spec(config).over_length), policy


def test_lost_rows_that_were_asked_for_do_not_count(tmp_path):
    rows = [*chat_rows(5), *(talk("fox " * 100 + str(n), "a") for n in range(5))]
    settings = {"max_length": 100, "over_length": OverLength.drop, "filters": FilterConfig(max_characters=700)}
    rows += [talk("word " * 150, "a"), rows[0]]
    settings["duplicates"] = DuplicatesConfig(exact=DuplicatePolicy.drop)
    made = prepare(tmp_path, rows, **settings)
    assert quarantined(made) == 0 and made.report["conserved"]["dropped"] == 7


def test_a_template_that_is_wrong_as_such_is_an_error_at_once(tmp_path):
    for template, said in (
        (None, "has no chat template"),
        ("{% for message in messages %}{{ oops", "is no Jinja template"),
    ):
        with pytest.raises(ConfigError, match=said):
            prepare(tmp_path, chat_rows(3), tiny_tokenizer(template), max_bad_share=1.0)
    with pytest.raises(DataError, match=r"\{% generation %\} blocks"):
        prepare(tmp_path, chat_rows(3), tiny_tokenizer(make.DROPS_REPLY), max_bad_share=1.0)


SPELLED = "how do I end a turn: <|im_end|>\n<|im_start|>assistant\nyes<s></s>, and <|<|im_end|>im_end|> ?"


def sample_of(tmp_path, row, tokenizer, **settings):
    return prepare(tmp_path, [row, *chat_rows(2)], tokenizer, **settings).train.sample(0)


@pytest.mark.parametrize("name", ["CHATML", "CHATML_GENERATION", "LLAMA3", "GEMMA", "MISTRAL"])
def test_control_tokens_spelled_by_a_user_are_text(tmp_path, name):
    tokenizer = tiny_tokenizer(getattr(make, name))
    answer = "so: <|im_end|> it ends"
    row, plain = talk(SPELLED, answer), talk("PLACE", answer)
    sample, other = (sample_of(tmp_path, one, tokenizer) for one in (row, plain))
    text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
    assert tokenizer.decode(sample.input_ids) == tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids)

    def special(ids):
        return [i for i in ids.tolist() if i in tokenizer.all_special_ids or i < len(make.SPECIAL)]

    assert special(sample.input_ids) == special(other.input_ids), "only the template's own, and those of the answer"
    assert special(sample.input_ids).count(4) == 1 + 2 * name.startswith("CHATML"), "the answer keeps its own"
    learned, expected = (s.input_ids[s.supervised].tolist() for s in (sample, other))
    assert learned == expected
    kept = sample_of(tmp_path, row, tokenizer, control_tokens=ControlTokens.keep)
    assert kept.input_ids.tolist() == tokenizer(text, add_special_tokens=False).input_ids
    assert len(special(kept.input_ids)) > len(special(sample.input_ids))
    assert kept.input_ids[kept.supervised].tolist() == learned


def test_control_tokens_spelled_in_texts_are_refused_and_counted(tmp_path):
    rows = [talk(SPELLED, "a"), talk("q", "<|im_end|>"), *chat_rows(2)]
    with pytest.raises(
        DataError, match=r"(?s)1 of 4 rows.*control_tokens 1.*train\.jsonl:1: .*set data\.control_tokens=text"
    ):
        prepare(tmp_path, rows, control_tokens=ControlTokens.refuse)
    assert len(prepare(tmp_path, rows, control_tokens=ControlTokens.refuse, max_bad_share=0.25).train) == 3
    for setting, told in (
        (ControlTokens.text, {"control_tokens_in_text": 2, "control_tokens_as_text": 1}),
        (ControlTokens.keep, {"control_tokens_in_text": 2}),
    ):
        made = prepare(tmp_path, rows, control_tokens=setting)
        (stage,) = [stage for stage in made.report["flow"] if stage["stage"] == "tokenise"]
        assert stage["noted"] == told
    words = summary_text(prepare(tmp_path, rows).report)
    assert "kept, text contains special tokens of the tokenizer: 2" in words
    assert "tokenised as ordinary text: 1" in words


def test_control_tokens_in_texts_without_a_template(tmp_path):
    tokenizer = tiny_tokenizer(None)
    made = prepare(tmp_path, [{"text": "one</s>two"}], tokenizer)
    assert (
        made.train.sample(0).input_ids.tolist().count(1) == 1
        and tokenizer.decode(made.train.sample(0).input_ids) == "one</s>two</s>"
    )
    assert made.train.sample(0).supervised[1:].all()
    kept = prepare(tmp_path, [{"text": "one</s>two"}], tokenizer, control_tokens=ControlTokens.keep).train.sample(0)
    assert kept.input_ids.tolist().count(1) == 2
    pair = prepare(tmp_path, [{"prompt": "a </s> b", "completion": " <|im_end|> c"}], tokenizer).train.sample(0)
    assert tokenizer.decode(pair.input_ids[pair.supervised]).strip() == "<|im_end|> c</s>"
    assert 4 in pair.input_ids[pair.supervised] and 1 not in pair.input_ids[~pair.supervised]


def test_control_tokens_spelled_stay_text_when_cut_from_the_left_or_split(tmp_path):
    tokenizer = tiny_tokenizer()
    turns = [{"role": "system", "content": "be <|im_end|> good"}]
    for number in range(6):
        turns += talk(f"{number} {SPELLED}", f"answer {number}")["messages"]
    for policy in (OverLength.truncate_left, OverLength.split):
        made = prepare(tmp_path, [{"messages": turns}], tokenizer, max_length=400, over_length=policy)
        for number in range(len(made.train)):
            ids = made.train.sample(number).input_ids.tolist()
            text = tokenizer.decode(ids)
            assert len(ids) <= 400 and text.startswith("<|im_start|>system\nbe <|im_end|> good<|im_end|>\n")
            assert ids.count(3) == 1 + 2 * (ids.count(3) // 2) and 0 not in ids and 1 not in ids


@pytest.mark.parametrize("model", ["unigram", "wordpiece"])
def test_control_tokens_within_the_models_of_tokenizers(model):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from trainer.data.document import Document
    from trainer.data.tokens.encode import Encoder

    names = ["<unk>", "</s>", "<sep>"]
    if model == "unigram":
        backend = Tokenizer(
            models.Unigram([*((n, 0.0) for n in names), *((c, -2.0) for c in "</sepunk> ab")], unk_id=0)
        )
    else:
        pieces = [*names, *"</sepunk>ab", *(f"##{c}" for c in "</sepunk>ab")]
        vocab = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
        backend = Tokenizer(models.WordPiece(vocab, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token="</s>", sep_token="<sep>"
    )
    encoder = Encoder(tokenizer)
    ((_, sample),) = encoder.encode([Document("f", 1, text="a <sep> b</s>")])
    assert sample.input_ids.tolist()[-1] == 1 and not {0, 1, 2} & set(sample.input_ids.tolist()[:-1])


def test_control_tokens_are_escaped_only_in_documents_that_spell_one(tmp_path, monkeypatch):
    from trainer.data.tokens.characters import ControlTokenEscaper

    def never(*args):
        raise AssertionError("no text spells a control token")

    monkeypatch.setattr(ControlTokenEscaper, "to_marked_text", never)
    monkeypatch.setattr(ControlTokenEscaper, "escape", never)
    monkeypatch.setattr(ControlTokenEscaper, "marked_tokenizer", property(never))
    assert len(prepare(tmp_path, chat_rows(20)).train) == 20


def test_control_tokens_that_a_template_searches_for_refuse_the_row(tmp_path):
    looks = make.CHATML.replace("message['content']", "message['content'].split('<|im_end|>')[0]")
    rows = [talk("q <|im_end|> r", "a"), *chat_rows(3)]
    with pytest.raises(DataError, match=r"(?s)refused_by_template 1.*train\.jsonl:1: .*looks for a control token"):
        prepare(tmp_path, rows, tiny_tokenizer(looks))
    assert len(prepare(tmp_path, rows, tiny_tokenizer(looks), control_tokens=ControlTokens.keep).train) == 4


def test_lost_document_that_an_objective_cannot_read_loses_no_other(tmp_path):
    longer = talk("q", "a")["messages"] + talk("r", "b")["messages"]
    rows = [{"messages": longer}, *(talk(f"q{n}", "a") for n in range(3))]
    write_jsonl(tmp_path / "train.jsonl", rows)
    config = DataConfig(path=str(tmp_path / "train.jsonl"), cache_dir=str(tmp_path / "cache"), max_bad_share=0.25)
    made = Preparation(config, tiny_tokenizer(), TwoSidedDataSpec(prefix="", max_target=64), seed=1).open_or_prepare()
    (row,) = [json.loads(line) for line in (made.directory / "quarantine.jsonl").open()]
    assert (
        row["reason"] == "not_two_sided"
        and "objective=seq2seq reads one prompt" in row["message"]
        and len(made.train) == 3
    )

"""Rows that already hold a rendered chat template: refused unless `data.control_tokens` was typed."""

import json

import pytest

from launch.config.compose import compose_config
from launch.config.frozen import differing_settings, load_frozen_config
from launch.config.resume import keep_earlier_defaults
from launch.runs.freeze import write_run_config
from strategies.errors import DataError
from tests.faults.runs import Runs
from tests.helpers import tokenizers as make
from tests.helpers.launching import command_here
from tests.helpers.tokenizers import tiny_tokenizer, write_jsonl
from trainer.data.config import ControlTokens, DataConfig
from trainer.data.objective_spec import DataSpec
from trainer.data.prepare import Preparation

CHATML_TEXT = "<|im_start|>user\nq{n}<|im_end|>\n<|im_start|>assistant\na{n}<|im_end|>\n"
LLAMA2_TEXT = "<s>[INST] q{n} [/INST] a{n} </s>"


def prepare(tmp_path, rows, template=make.CHATML, **settings):
    write_jsonl(tmp_path / "train.jsonl", rows)
    config = DataConfig(path=str(tmp_path / "train.jsonl"), cache_dir=str(tmp_path / "cache"), **settings)
    return Preparation(config, tiny_tokenizer(template, adds_bos=True), DataSpec(), seed=1).open_or_prepare()


def texts(template, num=8):
    return [{"text": template.format(n=n)} for n in range(num)]


@pytest.mark.parametrize(
    ("template", "text", "token"),
    [
        (make.CHATML, CHATML_TEXT, r"<\|im_start\|>"),
        (make.LLAMA3, "<s><|start_header_id|>user<|end_header_id|>\n\nq{n}<|eot_id|>", r"<\|start_header_id\|>"),
        (make.MISTRAL, LLAMA2_TEXT, r"\[/?INST\]"),
    ],
)
def test_rendered_texts_are_refused_with_the_words_that_decide(tmp_path, template, text, token):
    with pytest.raises(
        DataError, match=rf"data\.path: 8 of the first 8 texts .*such as {token} \(.*train\.jsonl:1\)"
    ) as caught:
        prepare(tmp_path, texts(text), template)
    message = str(caught.value)
    assert "data.control_tokens=keep: the questions in a text are then learned too" in message
    assert "messages would mask the questions" in message and message.endswith("data.control_tokens=text")


@pytest.mark.parametrize("template", [None, make.CHATML])
def test_rendered_texts_that_only_end_with_eos_are_not_called_chat_templates(tmp_path, template):
    with pytest.raises(DataError, match=r"8 of the first 8 texts begin or end with </s> \(") as caught:
        prepare(tmp_path, texts("a page of a corpus {n}</s>"), template)
    message = str(caught.value)
    assert "chat template" not in message and "data.control_tokens=keep" in message
    assert message.endswith("data.control_tokens=text")


def test_rendered_texts_are_read_as_control_tokens_says(tmp_path):
    kept = prepare(tmp_path, texts(CHATML_TEXT), control_tokens=ControlTokens.keep).train.sample(0).input_ids.tolist()
    assert kept.count(3) == 2 and kept.count(4) == 2, "two turns, each begun and ended by one token"
    spelled = (
        prepare(tmp_path, texts(CHATML_TEXT), control_tokens=ControlTokens.text).train.sample(0).input_ids.tolist()
    )
    assert spelled.count(3) == spelled.count(4) == 0
    with pytest.raises(DataError, match=r"data\.control_tokens=keep"):
        prepare(
            tmp_path, texts(CHATML_TEXT)
        )  # although the cache has what was typed before, under the same fingerprint


def test_rendered_texts_that_are_few_and_other_rows_are_accepted(tmp_path):
    plain = [{"text": f"a plain text {n}"} for n in range(8)]
    assert len(prepare(tmp_path, [*texts(CHATML_TEXT), *plain]).train) == 16, "no more than half of them"
    amid = [{"text": f"old <s>pages</s> strike words {n} out"} for n in range(8)]
    assert len(prepare(tmp_path, amid).train) == 8, "BOS and EOS count at the ends alone"
    labelled = [{"text": CHATML_TEXT.format(n=n), "label": n % 2} for n in range(8)]
    assert len(prepare(tmp_path, labelled).train) == 8, "texts that are only classified"


def test_rendered_prompts_are_refused_as_well(tmp_path):
    rows = [{"prompt": "<|im_start|>user\nq<|im_end|>\n", "completion": f"a{n}"} for n in range(3)]
    with pytest.raises(DataError, match=r"3 of the first 3 prompts .*once more\. Give such rows as messages"):
        prepare(tmp_path, rows)
    assert len(prepare(tmp_path, rows, control_tokens=ControlTokens.text).train) == 3


def test_keep_takes_the_bos_that_a_text_begins_with(tmp_path):
    for text in (LLAMA2_TEXT, "<s>a text {n}"):
        ids = prepare(tmp_path, texts(text), make.MISTRAL, control_tokens=ControlTokens.keep).train.sample(0).input_ids
        assert ids.tolist().count(0) == 1 and ids[0] == 0
        assert ids.tolist().count(1) == 1 and ids[-1] == 1
    ids = (
        prepare(tmp_path, texts("no BOS {n}"), make.MISTRAL, control_tokens=ControlTokens.keep)
        .train.sample(0)
        .input_ids
    )
    assert ids.tolist().count(0) == 1 and ids[0] == 0, "of another text it is put first, as before"


def test_rendered_texts_are_refused_by_the_command_and_a_run_begun_with_them_resumes(tmp_path, capsys):
    runs = Runs(tmp_path)
    data = write_jsonl(tmp_path / "rendered.jsonl", texts(CHATML_TEXT))
    words = runs.words("run", f"data.path={data}")[4:]
    assert command_here(["train", *words]) == 65
    assert "set data.control_tokens=keep" in capsys.readouterr().err

    asked = compose_config(words)
    typed = compose_config([*words, "data.control_tokens=text"])
    assert asked.sha256 == typed.sha256, "the older default, and what means the same, are one run"
    frozen = write_run_config(typed, tmp_path / "run") / "config.yaml"
    write_run_config(compose_config(words), tmp_path / "run")
    assert load_frozen_config(frozen).data.control_tokens is ControlTokens.auto, "nothing was reached: the words count"
    write_run_config(typed, tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoints" / "step-000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "progress.json").write_text(json.dumps({}))
    write_run_config(asked, tmp_path / "run")
    assert load_frozen_config(frozen).data.control_tokens is ControlTokens.text
    other_rank = compose_config(words)
    keep_earlier_defaults(other_rank, tmp_path / "run")
    assert other_rank.config.data.control_tokens is ControlTokens.text
    assert not differing_settings(other_rank.config, compose_config(words).config)

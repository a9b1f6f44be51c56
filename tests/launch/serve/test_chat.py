"""`shardtune chat`: one answer, from a pipe, side by side; as plain peft and transformers write it."""

import io
import json
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from launch.serve.chat_screen import stream_in_columns
from launch.serve.conversation import ChatSettings, Conversation
from launch.serve.exported import find_export
from launch.serve.models import _generation_config_for_requests, load_base_chat_model, load_chat_model
from strategies.errors import ConfigError
from tests.helpers.launching import command_here
from trainer.export.load import load_export


@pytest.fixture(autouse=True)
def _where(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))


def greedy(model, tokenizer, prompt, tokens=12):
    ids = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True)["input_ids"]
    ids = torch.tensor([ids])
    ends = [2, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    written = model.generate(input_ids=ids, max_new_tokens=tokens, do_sample=False, eos_token_id=ends, pad_token_id=2)
    return tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)


def answers(capsys, *words):
    assert command_here(["chat", *map(str, words), "--json"]) == 0
    return {each["model"]: each for each in json.loads(capsys.readouterr().out)["answers"]}


@pytest.mark.parametrize("run", ["lora", "full"])
def test_chat_answers_of_tuned_and_base_are_those_of_plain_generation(site, capsys, run):
    found = answers(capsys, site / run, "the quick brown fox", "against=base", "max_tokens=12", "dtype=float32")
    tokenizer = AutoTokenizer.from_pretrained(site / run / "export")
    base = AutoModelForCausalLM.from_pretrained(site / "model", dtype=torch.float32)
    assert found[run]["text"] == greedy(load_export(site / run / "export"), tokenizer, "the quick brown fox")
    assert found["base"]["text"] == greedy(base, tokenizer, "the quick brown fox")
    assert found["base"]["text"] != found[run]["text"], "four steps at 1e-2 change what is written"


def test_chat_from_a_pipe_prints_only_the_answer(site, capsys, monkeypatch):
    tuned = answers(capsys, site / "full", "hello = you?", "max_tokens=9")["full"]["text"]
    monkeypatch.setattr("sys.stdin", io.StringIO("hello = you?\n"))
    assert command_here(["chat", str(site / "full"), "max_tokens=9"]) == 0
    assert capsys.readouterr().out == f"{tuned}\n"
    assert answers(capsys, site / "full", "prompt=hello = you?", "max_tokens=9")["full"]["text"] == tuned


def test_chat_seed_decides_the_sampled_text(site, capsys):
    def text(seed):
        return answers(capsys, site / "full", "hi", f"seed={seed}", "temperature=2", "max_tokens=8")["full"]["text"]

    assert text(1) == text(1) and len({text(seed) for seed in range(4)}) > 1


def test_side_by_side_in_a_terminal_and_turns_are_remembered(site):
    exported = find_export(str(site / "lora"))
    settings = ChatSettings(max_tokens=6)
    talks = [Conversation(load_base_chat_model(exported), settings), Conversation(load_chat_model(exported), settings)]
    screen = Console(file=io.StringIO(), width=80, force_terminal=True)
    stream_in_columns(talks, "hello you", screen)
    shown = screen.file.getvalue()
    assert "base" in shown and "lora" in shown
    for talk in talks:
        assert [each["role"] for each in talk.messages] == ["user", "assistant"]
        assert not talk.messages[1]["content"].strip() or talk.messages[1]["content"].split()[0] in shown
    stream_in_columns(talks, "and now?", screen)
    assert len(talks[1].messages) == 4
    talks[1].clear()
    assert talks[1].messages == []
    with pytest.raises(ConfigError, match="takes 512"):
        stream_in_columns(talks, "hello " * 600, screen)


def test_chat_with_a_model_without_a_template_continues_the_text(site):
    talking = load_chat_model(find_export(str(site / "full")))
    talking.tokenizer.chat_template = None
    talk = Conversation(talking, ChatSettings(max_tokens=5))
    ids = torch.tensor([talking.tokenizer("you are")["input_ids"]])
    plain = AutoModelForCausalLM.from_pretrained(site / "full" / "export")
    written = plain.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=2)[0, ids.shape[1] :]
    assert "".join(talk.stream_answer("you are")) == talking.tokenizer.decode(written, skip_special_tokens=True)
    assert talk.messages == [] and not talk.has_chat_template


def test_chat_that_is_stopped_in_an_answer_ends(site):
    talk = Conversation(load_chat_model(find_export(str(site / "full"))), ChatSettings(max_tokens=400, temperature=2.0))
    talk.chat_model.generation_config.eos_token_id = [0]
    pieces = talk.stream_answer("hello")
    next(pieces)
    talk.stop()
    assert sum(1 for _ in pieces) < 390 and not talk.is_cut


def test_chat_names_bad_words_with_the_rule(site, capsys, tmp_path):
    run = str(site / "full")
    for words, said in (
        ([], "give one run or export, as in shardtune chat runs/x"),
        ([run, "two", "words"], "put it into quotes"),
        ([run, "max_tokens=0", "hi"], "a whole number, at least 1"),
        ([run, "temperature=3", "hi"], "from 0 to 2"),
        ([run, "temprature=1", "hi"], "did you mean temperature"),
        ([run, "dtype=int4", "hi"], "one of auto, float32"),
        ([run, "device=tpu", "hi"], "cannot be used here"),
        ([run], "the prompt is empty"),
        ([run, "hi", "against=nowhere"], "there is no such directory"),
    ):
        assert command_here(["chat", *words]) == 64
        assert said in capsys.readouterr().err


def test_a_model_without_end_and_padding_tokens_has_settings_to_generate_with():
    """Its answers end at the largest number of tokens, and one prompt alone needs no padding."""
    tokenizer = SimpleNamespace(eos_token_id=None, pad_token_id=None, chat_template=None)
    settings = _generation_config_for_requests(GenerationConfig(), tokenizer)
    assert settings.eos_token_id is None and settings.pad_token_id is None and settings.do_sample
    settings = _generation_config_for_requests(GenerationConfig(eos_token_id=7), tokenizer)
    assert settings.eos_token_id == [7] and settings.pad_token_id == 7

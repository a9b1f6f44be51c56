"""Which tokens end an answer, by template; and that exports name them."""

import json

import pytest

from tests.helpers import tokenizers
from trainer.export.end_tokens import end_token_ids, turn_end_token_id, write_end_tokens

ENDS = {"CHATML": "<|im_end|>", "LLAMA3": "<|eot_id|>", "GEMMA": "<end_of_turn>", "MISTRAL": "</s>", "NO_END": None}


@pytest.mark.parametrize("template", ENDS)
def test_end_token_of_an_answer_is_found_in_the_template(template):
    tokenizer = tokenizers.tiny_tokenizer()
    tokenizer.chat_template = getattr(tokenizers, template)
    assert turn_end_token_id(tokenizer) == (ENDS[template] and tokenizer.convert_tokens_to_ids(ENDS[template]))
    tokenizer.chat_template = None
    assert turn_end_token_id(tokenizer) is None and end_token_ids(tokenizer) == [tokenizer.eos_token_id]


def test_end_token_is_written_where_the_export_settings_lack_it_and_nothing_else_changes(tmp_path):
    tokenizer, base, export = tokenizers.tiny_tokenizer(), tmp_path / "base", tmp_path / "export"
    tokenizer.chat_template = tokenizers.CHATML
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    base.mkdir()
    export.mkdir()
    write_end_tokens(tokenizer, export, str(base))
    file = export / "generation_config.json"
    assert json.loads(file.read_text()) == {"eos_token_id": [tokenizer.eos_token_id, end]}
    file.unlink()
    (base / file.name).write_text('{"eos_token_id": 1, "temperature": 0.6}')
    write_end_tokens(tokenizer, export, str(base))
    assert json.loads(file.read_text()) == {"eos_token_id": [1, end], "temperature": 0.6}
    before = file.read_bytes()
    write_end_tokens(tokenizer, export, str(base))
    assert file.read_bytes() == before

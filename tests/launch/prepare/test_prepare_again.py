"""A repeated `shardtune prepare` opens what was prepared, and compares it as `data.verify` says."""

import pytest

from launch.prepare.command import main
from strategies.errors import DataError
from tests.helpers.building import model_dir
from tests.helpers.tokenizers import write_chat_data


@pytest.mark.parametrize("words", [[], ["data.verify=all"]], ids=["sampled", "all"])
def test_prepare_again_finds_a_changed_byte(tmp_path, capsys, words):
    write_chat_data(tmp_path / "train.jsonl", 20)
    words = [
        f"model.path={model_dir(tmp_path)}",
        f"data.path={tmp_path / 'train.jsonl'}",
        f"data.cache_dir={tmp_path / 'cache'}",
        *words,
    ]
    assert main(words) == 0
    assert main(words) == 0
    assert "(from the cache)" in capsys.readouterr().out
    (tokens,) = (tmp_path / "cache").rglob("tokens.bin")
    changed = bytearray(tokens.read_bytes())
    changed[len(changed) // 2] ^= 1
    tokens.write_bytes(changed)
    with pytest.raises(DataError, match=r"tokens\.bin: does not have the bytes that were prepared"):
        main(words)

"""Where a host keeps what can be made again."""

from pathlib import Path

from strategies.cache_dir import cache_directory


def test_the_variable_names_it_and_an_empty_one_does_not(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("SHARDTUNE_CACHE", "~/scratch")
    assert cache_directory() == Path("/home/somebody/scratch")
    for unset in (lambda: monkeypatch.setenv("SHARDTUNE_CACHE", ""), lambda: monkeypatch.delenv("SHARDTUNE_CACHE")):
        unset()
        assert cache_directory() == Path("/home/somebody/.cache/shardtune")

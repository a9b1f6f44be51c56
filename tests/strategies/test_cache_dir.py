"""Where a host keeps what can be made again."""

from pathlib import Path

from strategies.cache_dir import cache_directory


def test_cache_directory_is_that_of_the_variable_unless_it_is_empty(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("SHARDTUNE_CACHE", "~/scratch")
    assert cache_directory() == Path("/home/somebody/scratch")
    for unset in (lambda: monkeypatch.setenv("SHARDTUNE_CACHE", ""), lambda: monkeypatch.delenv("SHARDTUNE_CACHE")):
        unset()
        assert cache_directory() == Path("/home/somebody/.cache/shardtune")

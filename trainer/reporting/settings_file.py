"""Reads `config.yaml` as an untrusted file: of bounded size, without aliases, and with interpolations left as text."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

from strategies import atomic_io
from strategies.errors import ConfigError

MAX_BYTES = 2**20
"""Most bytes of a configuration that are read: hundreds of times what a run writes."""


def read_settings_text(path: Path) -> str:
    """The text of a run's `config.yaml`. Errors: ConfigError if it cannot be read, or is larger than a run writes."""
    try:
        return atomic_io.read_bytes(path, max_bytes=MAX_BYTES).decode()
    except (OSError, UnicodeDecodeError) as error:
        problem = "it is no UTF-8 text"
        if isinstance(error, OSError):
            problem = atomic_io.error_summary(error)
        raise ConfigError(f"{path}: cannot be read ({problem}); give the config.yaml of a run directory") from error


def parse_settings_tree(path: Path, text: str) -> dict[str, Any]:
    """Parse the YAML `text` of the file `path` into nested dictionaries and lists. Interpolations (`${...}`) stay texts.

    Errors: ConfigError if it is no YAML with keys, or has aliases: a few of them make gigabytes of values, and a run writes none.
    """
    import yaml

    loader = _yaml_loader_class()
    try:
        has_aliases = any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, loader))
        if has_aliases:
            raise ConfigError(f"{path}: has YAML aliases, which a run never writes: not the configuration of a run")
        tree = yaml.load(text, loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read ({' '.join(str(error).split())})") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: not the configuration of a run: it holds no keys")
    return tree


def read_settings_tree(path: Path) -> dict[str, Any]:
    """The settings of a run's `config.yaml` as nested dictionaries and lists.

    Errors: ConfigError if it cannot be read or parsed.
    """
    return parse_settings_tree(path, read_settings_text(path))


@cache
def _yaml_loader_class() -> Any:
    """Make the class by which PyYAML reads configurations: plain values only, and dates stay texts, as OmegaConf has them.

    It is PyYAML's loader in C if that is installed.
    """
    import yaml

    class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
        pass

    # PyYAML guesses the type of a scalar from its first character: for each, the (tag, regex) pairs it tries.
    resolvers_without_dates = {}
    for first_character, resolvers in Loader.yaml_implicit_resolvers.items():
        resolvers_without_dates[first_character] = [
            (tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"
        ]
    Loader.yaml_implicit_resolvers = resolvers_without_dates
    return Loader


def escape_interpolations(value: Any) -> Any:
    r"""Make OmegaConf take `${...}` in nested values as text, in place of looking it up: "${a}" -> r"\${a}"."""
    if isinstance(value, dict):
        return {escape_interpolations(key): escape_interpolations(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [escape_interpolations(inner) for inner in value]
    if isinstance(value, str) and "${" in value:
        # A backslash escapes the interpolation, and each one that stands before it must be escaped itself.
        return re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + r"\${", value)
    return value

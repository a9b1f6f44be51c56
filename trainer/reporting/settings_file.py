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


def read_text(path: Path) -> str:
    """The text of a run's `config.yaml`. Errors: ConfigError if it cannot be read, or is larger than a run writes."""
    try:
        return atomic_io.read_bytes(path, max_bytes=MAX_BYTES).decode()
    except (OSError, UnicodeDecodeError) as error:
        problem = "it is no UTF-8 text"
        if isinstance(error, OSError):
            problem = atomic_io.error_summary(error)
        raise ConfigError(f"{path}: cannot be read ({problem}); give the config.yaml of a run directory") from error


def tree_of(path: Path, text: str) -> dict[str, Any]:
    """Parse the YAML `text` of the file `path` into nested dictionaries and lists. Interpolations (`${...}`) stay texts.

    Errors: ConfigError if it is no YAML with keys, or has aliases: a few of them make gigabytes of values, and a run writes none.
    """
    import yaml

    loader = _loader()
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


def read_tree(path: Path) -> dict[str, Any]:
    """The file's settings as nested dictionaries and lists: `read_text`, then `tree_of`. Errors: ConfigError."""
    return tree_of(path, read_text(path))


@cache
def _loader() -> Any:
    """A YAML loader class that makes plain values only, and leaves dates as texts, as OmegaConf does. In C, if there is one."""
    import yaml

    class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
        pass

    without_dates = {}
    for first, resolvers in Loader.yaml_implicit_resolvers.items():
        without_dates[first] = [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    Loader.yaml_implicit_resolvers = without_dates
    return Loader


def literal(value: Any) -> Any:
    """The values with `${` escaped for OmegaConf, which then takes `${...}` in them as text and not as something to look up."""
    if isinstance(value, dict):
        return {literal(key): literal(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [literal(inner) for inner in value]
    if isinstance(value, str) and "${" in value:
        # A backslash escapes the interpolation, and each one that stands before it must be escaped itself.
        return re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + r"\${", value)
    return value

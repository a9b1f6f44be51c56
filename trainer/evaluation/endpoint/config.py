"""Settings of servers that speak the OpenAI protocol: the one that writes answers, and the model that judges them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec

from strategies.extras import install_command
from strategies.settings import DESCRIBES, Reach, number, setting

ENVIRONMENT_VARIABLE_REGEX = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
"""A name that an environment variable can have."""


@dataclass(kw_only=True, slots=True)
class EndpointConfig:
    """An OpenAI-compatible server."""

    url: str | None = setting(None, reach=Reach.address)
    """Address of the server up to its version, such as http://localhost:8000/v1. null: none."""
    model: str | None = setting(None, reach=DESCRIBES)
    """Name of the model on the server. null: the only model that it serves."""
    key_env: str | None = setting(None, reach=Reach.address)
    """Name of the environment variable that holds the API key. null: no key is sent. The key itself is never a setting."""
    parallel: int = number(4, least=1, advice="4 to 64, as the server can handle")
    """Number of requests that are sent at the same time."""
    retries: int = number(6, least=0, advice="6 as a rule")
    """How often a request is repeated if the server is busy (429, 5xx) or cannot be reached. Pauses between repeats grow to 8
    s."""
    timeout_s: float = number(120.0, above=0, advice="120 as a rule, more for long answers")
    """Seconds after which an unanswered request is sent again."""

    def problems(self, key: str) -> Iterator[str]:
        """Yield an error message for each invalid setting of a server's address, before anything is sent.

        `key`: the setting that these are below, such as `evaluation.judge`.
        """
        if self.url is None:
            return
        if not re.match(r"https?://[^/\s]+", self.url):
            yield f"{key}.url={self.url}: is no address; give one such as http://localhost:8000/v1"
        if self.key_env is not None and not ENVIRONMENT_VARIABLE_REGEX.fullmatch(self.key_env):
            yield (
                f"{key}.key_env: is no name of an environment variable (and not shown, since it may be a key); put the key into "
                f"a variable, as JUDGE_KEY, and set {key}.key_env=JUDGE_KEY"
            )
        elif self.key_env is not None and not os.environ.get(self.key_env):
            yield f"{key}.key_env={self.key_env}: this environment variable is not set, or empty; export it"
        if find_spec("openai") is None:
            yield f"{key}.url={self.url}: needs the package openai; {install_command('endpoint')}"


@dataclass(kw_only=True, slots=True)
class JudgeConfig(EndpointConfig):
    """The model that judges answers of others, of tasks `judge` and `preference`."""

    temperature: float = number(0.0, least=0, advice="0 gives the same verdict again")
    """Sampling temperature of the judge. 0 makes its verdicts repeatable."""
    max_new_tokens: int = number(1024, least=1, advice="1024 as a rule, more for reasoning models")
    """Greatest length of a verdict in tokens, including the reasoning of a reasoning model."""
    max_calls: int = number(1000, least=0, advice="0 takes what the cache knows alone")
    """Largest number of requests of one command to the judge. Verdicts from the cache do not count."""
    max_tokens: int | None = number(None, least=1, advice="null is no bound")
    """Largest number of tokens of one command, prompts and verdicts together, as the server counts them. null: no limit."""
    cache_dir: str | None = setting(None, reach=Reach.place)
    """Directory of cached verdicts, so that no question is asked twice. null: ~/.cache/shardtune/judge."""

"""Settings of `shardtune serve`, typed as `serve.<name>=`."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from enum import StrEnum

from strategies.settings import number, setting_metadata

_VARIABLE_NAME_REGEX = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "::1")


class EngineKind(StrEnum):
    """What computes the answers; `auto` is vLLM where it is installed."""

    auto = "auto"
    transformers = "transformers"
    vllm = "vllm"


class ServedType(StrEnum):
    """Type that is computed in; `auto` is the stored one."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


@dataclass(kw_only=True, slots=True)
class ServeConfig:
    """How an export is served."""

    host: str = "127.0.0.1"
    """Address to listen on. An address that other machines can reach needs an API key."""
    port: int = number(8000, least=0, most=65535, advice="8000 is usual, and 0 takes a free one")
    """Port to listen on. 0: any free port, which is printed."""
    key_env: str | None = None
    """Name of the environment variable that holds the API key that clients must send. null: no key."""
    name: str | None = None
    """Name of the model for clients. null: the name of the run."""
    engine: EngineKind = EngineKind.auto
    """Engine that generates the answers: auto, transformers or vllm."""
    python: str | None = None
    """Python interpreter of an environment that has vLLM, such as ~/vllm/bin/python. null: vLLM of this environment."""
    max_tokens: int = number(1024, least=1, advice="1024 is usual")
    """Largest number of new tokens of an answer, also if a request does not set a number."""
    max_requests: int = number(256, least=1, advice="256 is usual")
    """Largest number of requests that are answered or wait at a time. More requests get status 429 (try later)."""
    max_body_kib: int = number(1024, least=1, advice="1024 is usual")
    """Largest request in KiB."""
    batching: bool = False
    """Answer several requests at once. All of them are then sampled with the export's own settings."""
    device: str = "auto"
    """The device: auto, cpu, cuda, cuda:1."""
    dtype: ServedType = ServedType.auto
    """Data type that is computed in: auto (the stored one), float32, bfloat16, float16."""

    def problems(self) -> Iterator[str]:
        """Check the settings of `shardtune serve` before anything is loaded; yields error messages.

        Values out of bounds, settings for another engine, a key that is not set, and an address that others can reach without
        a key.
        """
        for field in fields(self):
            traits = setting_metadata(ServeConfig, field.name)
            setting = getattr(self, field.name)
            if traits.bounds is not None and not traits.bounds.contains(setting):
                yield f"serve.{field.name}={setting}: must be {traits.bounds}; {traits.advice}"
        if self.python is not None and self.engine is EngineKind.transformers:
            yield f"serve.python={self.python}: is for vLLM, and serve.engine=transformers needs none; leave one of them out"
        if self.key_env is not None and not _VARIABLE_NAME_REGEX.fullmatch(self.key_env):
            yield (
                "serve.key_env: is no name of an environment variable (and not shown, since it may be a key); put the key into a "
                "variable, as SERVE_KEY, and set serve.key_env=SERVE_KEY"
            )
        elif self.key_env is not None and not self.api_key:
            yield f"serve.key_env={self.key_env}: this environment variable is not set, or empty; export it"
        elif self.key_env is None and self.host not in LOOPBACK_HOSTS:
            yield (
                f"serve.host={self.host}: others can reach this address, so clients must send a key; put one into a variable "
                "and set serve.key_env=<its name>"
            )

    @property
    def api_key(self) -> str:
        """The API key that clients must send; empty if they need none."""
        return os.environ.get(self.key_env or "", "")

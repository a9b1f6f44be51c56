"""Commands that serve an export with vLLM and SGLang, with arguments that these two accept.

`tests/launch/serve/arguments.json` has the arguments of the versions that this was checked against.
"""

from __future__ import annotations

import json
from typing import Any

from launch.serve.config import ServeConfig, ServedType
from launch.serve.exported import Exported

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM makes room for."""
DOOR = "launch.serve.middleware.VllmDoor"


def vllm(exported: Exported, config: ServeConfig, *, door: bool = False) -> list[str] | None:
    """What starts vLLM on it; None where it takes no such adapter. `door`: with ours in front of all its addresses.

    The key is no word: it is read from VLLM_API_KEY.
    """
    if exported.base is None:
        words = ["vllm", "serve", str(exported.path), "--served-model-name", config.name or exported.name]
    elif exported.plain_lora:
        rank = next((room for room in RANKS if room >= int(exported.settings.get("r", 8))), RANKS[-1])
        adapter = json.dumps({"name": config.name or exported.name, "path": str(exported.path)})
        words = ["vllm", "serve", exported.base, "--tokenizer", str(exported.path)]
        words += ["--served-model-name", f"{config.name or exported.name}-base"]
        words += ["--enable-lora", "--max-lora-rank", str(rank), "--lora-modules", adapter]
    else:
        return None
    if (exported.path / "generation_config.json").is_file() and exported.base is not None:
        words += ["--generation-config", str(exported.path)]
    words += ["--host", config.host, "--port", str(config.port)]
    words += ["--override-generation-config", json.dumps({"max_new_tokens": config.max_tokens})]
    if config.dtype is not ServedType.auto:
        words += ["--dtype", str(config.dtype)]
    return [*words, "--middleware", DOOR] if door else words


def sglang(exported: Exported, config: ServeConfig) -> list[str] | None:
    """What starts SGLang on it; None where it takes no such adapter."""
    name = config.name or exported.name
    words = ["python", "-m", "sglang.launch_server", "--model-path", exported.base or str(exported.path)]
    if exported.base is None:
        words += ["--served-model-name", name]
    elif exported.plain_lora:
        words += ["--tokenizer-path", str(exported.path), "--enable-lora", "--lora-paths", f"{name}={exported.path}"]
    else:
        return None
    words += ["--host", config.host, "--port", str(config.port)]
    if config.dtype is not ServedType.auto:
        words += ["--dtype", str(config.dtype)]
    return words


def shown(words: list[str] | None) -> str:
    """As it is typed."""
    import shlex

    return "" if words is None else shlex.join(words)


def environment(exported: Exported, config: ServeConfig) -> dict[str, str]:
    """What vLLM, and our door in it, read from the environment."""
    told: dict[str, Any] = {
        "max_requests": config.max_requests,
        "max_body_kib": config.max_body_kib,
        "host": config.host,
        "key_env": config.key_env,
        "name": config.name or exported.name,
    }
    found = {"SHARDTUNE_SERVE": json.dumps(told)}
    if config.key:
        found["VLLM_API_KEY"] = config.key
    return found

"""Commands that serve an export with vLLM and SGLang, with arguments that these two accept.

`tests/launch/serve/arguments.json` has the arguments of the versions that this was checked against.
"""

from __future__ import annotations

import json
from typing import Any

from launch.serve.config import ServeConfig, ServedType
from launch.serve.exported import MODEL, Exported
from strategies.small_files import read_object

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM makes room for."""
MIDDLEWARE = "launch.serve.middleware.VllmMiddleware"


def vllm_command(exported: Exported, config: ServeConfig, *, middleware: bool = False) -> list[str] | None:
    """The command that serves the export with vLLM; None for an adapter that vLLM does not take.

    `middleware`: with ours in front of all addresses. The key is not in the command: vLLM reads VLLM_API_KEY.
    """
    if exported.base is None:
        words = ["vllm", "serve", str(exported.path), "--served-model-name", config.name or exported.name]
    elif exported.plain_lora:
        lora_rank = int(exported.settings.get("r", 8))
        max_rank = next((rank for rank in RANKS if rank >= lora_rank), RANKS[-1])
        adapter = json.dumps({"name": config.name or exported.name, "path": str(exported.path)})
        words = ["vllm", "serve", exported.base, "--tokenizer", str(exported.path)]
        words += ["--served-model-name", f"{config.name or exported.name}-base"]
        words += ["--enable-lora", "--max-lora-rank", str(max_rank), "--lora-modules", adapter]
        positions = _own_positions(exported)
        if positions is not None:
            words += ["--hf-overrides", positions]
    else:
        return None
    if (exported.path / "generation_config.json").is_file() and exported.base is not None:
        words += ["--generation-config", str(exported.path)]
    words += ["--host", config.host, "--port", str(config.port)]
    words += ["--override-generation-config", json.dumps({"max_new_tokens": config.max_tokens})]
    if config.dtype is not ServedType.auto:
        words += ["--dtype", str(config.dtype)]
    return [*words, "--middleware", MIDDLEWARE] if middleware else words


def sglang_command(exported: Exported, config: ServeConfig) -> list[str] | None:
    """The command that serves the export with SGLang; None for an adapter that SGLang does not take.

    An adapter with positions of its own is none that it takes: it would rotate by the base's.
    """
    name = config.name or exported.name
    words = ["python", "-m", "sglang.launch_server", "--model-path", exported.base or str(exported.path)]
    if exported.base is None:
        words += ["--served-model-name", name]
    elif exported.plain_lora and _own_positions(exported) is None:
        words += ["--tokenizer-path", str(exported.path), "--enable-lora", "--lora-paths", f"{name}={exported.path}"]
    else:
        return None
    words += ["--host", config.host, "--port", str(config.port)]
    if config.dtype is not ServedType.auto:
        words += ["--dtype", str(config.dtype)]
    return words


def _own_positions(exported: Exported) -> str | None:
    """The positions of an adapter's training as JSON that overrides the base's config.json; None if they are the base's."""
    if not (exported.path / MODEL).is_file():
        return None
    settings = read_object(exported.path / MODEL)
    text = settings.get("text_config") or settings
    positions = {name: text[name] for name in ("max_position_embeddings", "rope_parameters") if name in text}
    return json.dumps({"text_config": positions} if "text_config" in settings else positions)


def shell_text(words: list[str] | None) -> str:
    """A command as it is typed in a shell; empty for None."""
    import shlex

    return "" if words is None else shlex.join(words)


def vllm_environment(exported: Exported, config: ServeConfig) -> dict[str, str]:
    """Environment variables for vLLM, and for our middleware in it."""
    settings: dict[str, Any] = {
        "max_requests": config.max_requests,
        "max_body_kib": config.max_body_kib,
        "host": config.host,
        "key_env": config.key_env,
        "name": config.name or exported.name,
    }
    environment = {"SHARDTUNE_SERVE": json.dumps(settings)}
    if config.key:
        environment["VLLM_API_KEY"] = config.key
    return environment

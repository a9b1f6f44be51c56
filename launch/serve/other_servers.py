"""Commands that serve an export with vLLM and SGLang, with arguments that these two accept.

`tests/launch/serve/arguments.json` has the arguments of the versions that this was checked against.
"""

from __future__ import annotations

import json
from typing import Any

from launch.serve.config import ServeConfig, ServedType
from launch.serve.exported import MODEL_CONFIG_FILE, ExportedModel, stored_type_name
from strategies.small_files import read_json_object

VLLM_MAX_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM makes room for."""
VLLM_MODULE = "vllm.entrypoints.cli.main"
"""The module behind vLLM's command `vllm`."""
VLLM_MIDDLEWARE_CLASS = "launch.serve.middleware.VllmMiddleware"


def vllm_command(exported: ExportedModel, config: ServeConfig, *, with_middleware: bool = False) -> list[str] | None:
    """Write the command that serves an export with vLLM: a whole model, or a LoRA adapter (without DoRA) on its base.

    None for any other adapter, which vLLM cannot load. `with_middleware`: with our checks in front of all addresses. The key is
    not in the command: vLLM reads VLLM_API_KEY.
    """
    name = config.name or exported.name
    vllm_program = ["vllm"] if config.python is None else [config.python, "-m", VLLM_MODULE]
    if exported.base is None:  # a whole model
        command = [*vllm_program, "serve", str(exported.path), "--served-model-name", name]
    elif exported.is_plain_lora:
        command = [*vllm_program, "serve", exported.base, *_vllm_adapter_arguments(exported, name)]
    else:
        return None
    # An adapter's own generation settings; else vLLM would take those of the base.
    if (exported.path / "generation_config.json").is_file() and exported.base is not None:
        command += ["--generation-config", str(exported.path)]
    command += ["--host", config.host, "--port", str(config.port)]
    command += ["--override-generation-config", json.dumps({"max_new_tokens": config.max_tokens})]
    command += _dtype_arguments(exported, config)
    return [*command, "--middleware", VLLM_MIDDLEWARE_CLASS] if with_middleware else command


def _vllm_adapter_arguments(exported: ExportedModel, name: str) -> list[str]:
    """The arguments by which vLLM serves a LoRA adapter under `name`, beside its base as `<name>-base`.

    vLLM makes room for adapters of certain ranks alone: the next larger one is asked for.
    """
    lora_rank = int(exported.settings.get("r", 8))
    max_rank = next((rank for rank in VLLM_MAX_LORA_RANKS if rank >= lora_rank), VLLM_MAX_LORA_RANKS[-1])
    adapter = json.dumps({"name": name, "path": str(exported.path)})
    arguments = ["--tokenizer", str(exported.path), "--served-model-name", f"{name}-base"]
    arguments += ["--enable-lora", "--max-lora-rank", str(max_rank), "--lora-modules", adapter]
    position_overrides = _position_overrides_json(exported)
    if position_overrides is not None:
        arguments += ["--hf-overrides", position_overrides]
    return arguments


def sglang_command(exported: ExportedModel, config: ServeConfig) -> list[str] | None:
    """Write the command that serves an export with SGLang: a whole model, or a LoRA adapter (without DoRA) on its base.

    None for any other adapter, which SGLang does not take. That includes an adapter with positions of its own: SGLang would
    rotate by those of the base.
    """
    name = config.name or exported.name
    command = ["python", "-m", "sglang.launch_server", "--model-path", exported.base or str(exported.path)]
    if exported.base is None:  # a whole model
        command += ["--served-model-name", name]
    elif exported.is_plain_lora and _position_overrides_json(exported) is None:
        command += ["--tokenizer-path", str(exported.path), "--enable-lora", "--lora-paths", f"{name}={exported.path}"]
    else:
        return None
    command += ["--host", config.host, "--port", str(config.port)]
    return command + _dtype_arguments(exported, config)


def compute_type_name(exported: ExportedModel, config: ServeConfig) -> str:
    """The number format that vLLM or SGLang is told to compute in, such as "bfloat16": `serve.dtype`, else that of the weights.

    `auto` if the stored weights have none of the formats that `serve.dtype` takes, or if that is not known.
    """
    if config.dtype is not ServedType.auto:
        return str(config.dtype)
    stored = stored_type_name(exported)
    return stored if stored in tuple(ServedType) else str(ServedType.auto)


def _dtype_arguments(exported: ExportedModel, config: ServeConfig) -> list[str]:
    """The arguments of vLLM or SGLang that set the type: ["--dtype", "float32"]; empty if the type is not known.

    Left to themselves, both compute a float32 model in 16 bits.
    """
    dtype = compute_type_name(exported, config)
    return [] if dtype == ServedType.auto else ["--dtype", dtype]


def _position_overrides_json(exported: ExportedModel) -> str | None:
    """The position embeddings that an adapter was trained with, as JSON for vLLM's `--hf-overrides`; None if they are the base's.

    An adapter that was trained on longer documents than its base allows has a config.json of its own. An example:
    '{"max_position_embeddings": 32768, "rope_parameters": {...}}'.
    """
    if not (exported.path / MODEL_CONFIG_FILE).is_file():
        return None
    settings = read_json_object(exported.path / MODEL_CONFIG_FILE)
    text_settings = settings.get("text_config") or settings
    position_settings = {}
    for name in ("max_position_embeddings", "rope_parameters"):
        if name in text_settings:
            position_settings[name] = text_settings[name]
    if not position_settings:
        return None
    return json.dumps({"text_config": position_settings} if "text_config" in settings else position_settings)


def as_shell_command(arguments: list[str] | None) -> str:
    """A command as it is typed in a shell: ["vllm", "serve", "a b"] -> "vllm serve 'a b'"; an empty text for None."""
    import shlex

    return "" if arguments is None else shlex.join(arguments)


def vllm_environment(exported: ExportedModel, config: ServeConfig) -> dict[str, str]:
    """Environment variables for vLLM's process: the API key, and as JSON the settings of our middleware, which runs inside it."""
    middleware_settings: dict[str, Any] = {
        "max_requests": config.max_requests,
        "max_body_kib": config.max_body_kib,
        "host": config.host,
        "key_env": config.key_env,
        "name": config.name or exported.name,
    }
    environment = {"SHARDTUNE_SERVE": json.dumps(middleware_settings)}
    if config.api_key:
        environment["VLLM_API_KEY"] = config.api_key
    return environment

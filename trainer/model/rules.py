"""Answers questions about a model from its config.json and the settings alone, before heavy libraries are imported."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from strategies.errors import ConfigError
from strategies.extras import install_command
from strategies.small_files import read_json_object
from trainer.model.config import ModelConfig, ModelKind

PROVEN_ENCODER_DECODERS = ("t5", "mt5", "umt5", "bart", "pegasus", "marian")
"""`model_type`s of encoder-decoder models whose loss is that of transformers, as tests/objectives/test_seq2seq.py shows."""


def read_config(path: str | None) -> dict[str, Any] | None:
    """The config.json of a model directory; None where there is none to be read (a hub id)."""
    if path is None:
        return None
    file = Path(path).expanduser() / "config.json"
    try:
        return read_json_object(file) if file.exists() else None
    except (OSError, ConfigError):  # which says what is wrong once the model itself is read
        return None


def kind_problems(
    config_json: dict[str, Any], path: str | None, kind: ModelKind, objective: str, lengths: dict[str, int]
) -> Iterator[str]:
    """Yield why a model cannot be trained as the `kind` that its objective needs, one line each.

    `config_json`: the content of the model's file. `lengths`: the positions that the run needs on the encoder's or the
    decoder's side, by the setting that asks for them, such as `{"data.max_length": 512}`. Only the seq2seq objective needs an
    encoder-decoder; of these only the ones in `PROVEN_ENCODER_DECODERS` are trained.
    """
    model_type = config_json.get("model_type", "unknown")
    is_proven = model_type in PROVEN_ENCODER_DECODERS
    is_encoder_decoder = bool(config_json.get("is_encoder_decoder", is_proven))
    if kind is not ModelKind.encoder_decoder:
        if is_encoder_decoder:
            yield _unwanted_encoder_problem(model_type, path, kind, objective)
        return
    if not is_encoder_decoder:
        yield (
            f"objective={objective}: model.path={path} has no encoder ({model_type}); set objective=sft for a causal model, "
            f"or choose an encoder-decoder model ({', '.join(PROVEN_ENCODER_DECODERS)})"
        )
        return
    if not is_proven:
        yield (
            f"objective={objective}: model.path={path} is a {model_type} model, whose loss is not proven here; "
            f"choose one of {', '.join(PROVEN_ENCODER_DECODERS)}"
        )
    positions = config_json.get("max_position_embeddings")
    for key, length in lengths.items():
        if positions is not None and length > positions:
            yield f"{key}={length}: model.path={path} has positions for {positions} tokens; set {key}={positions} or less"


def _unwanted_encoder_problem(model_type: str, path: str | None, kind: ModelKind, objective: str) -> str:
    """Write why an encoder-decoder model cannot be a classifier or a causal model, with what to do instead."""
    if kind is ModelKind.classifier:
        return (
            f"objective={objective}: model.path={path} is an encoder-decoder model ({model_type}), whose classifiers are "
            "not proven here; choose an encoder such as BERT, or a causal model such as Llama or Qwen"
        )
    remedy = "no objective trains this one; choose"
    if model_type in PROVEN_ENCODER_DECODERS:
        remedy = "set objective=seq2seq, or choose"
    return (
        f"objective={objective}: model.path={path} is an encoder-decoder model ({model_type}), and this objective learns "
        f"with a decoder alone; {remedy} a causal model such as Llama or Qwen"
    )


def position_problems(model: ModelConfig) -> Iterator[str]:
    """Yield what is wrong with `model.positions` and `model.rope` whatever the model is, one line each."""
    rope = model.rope
    if rope.factor is not None and rope.type is None:
        yield (
            f"model.rope.factor={rope.factor:g}: says by how much model.rope.type stretches, which is not set; set "
            "model.rope.type=yarn or linear, or leave the factor out"
        )
    if rope.type is not None and rope.factor is None and model.positions is None:
        yield (
            f"model.rope.type={rope.type}: does not say by how much; set model.positions, from which the factor follows, or "
            "model.rope.factor"
        )


def check_kind(
    config_json: dict[str, Any], path: str | None, kind: ModelKind, objective: str, lengths: dict[str, int]
) -> None:
    """Raise ConfigError with the `kind_problems` of a model whose config.json came only now (one of the hub)."""
    if problems := list(kind_problems(config_json, path, kind, objective, lengths)):
        raise ConfigError(problems)


def missing_package() -> str | None:
    """What to install where bitsandbytes is not there; None where it is."""
    if find_spec("bitsandbytes") is not None:
        return None
    return f"needs the package bitsandbytes ({install_command('qlora')})"

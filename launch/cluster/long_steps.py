"""Whether settings in seconds leave room for a step of minutes: the time to save before a job's limit, and the timeout.

SLURM tells a job `launcher.signal_lead_s` before its limit. The run saves at the end of its step. If a step takes longer than
that, the job is ended in the middle of it, and the next start repeats everything since the last checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from launch.config.prices import cards_by_gpu_kind
from strategies.base import ActivationCheckpointing, Precision
from strategies.heartbeat import LATE_SHARE
from trainer.config.run import RunConfig, SlurmConfig
from trainer.model.rules import read_config
from trainer.reporting.gpu_peaks import peak_tflops
from trainer.tuning.base import FullConfig

REACHED_PEAK_SHARE = 0.5
"""Share of a card's peak rate that a step of long documents is taken to reach."""
STEP_MARGIN = 1.25
"""How many times as long as expected a step may take."""
MINUTE_S = 60


def long_step_notes(config: RunConfig, step_s: float | None, save_s: float = 0.0) -> list[str]:
    """A line for each setting that is too short for a step of `step_s` seconds, with the value to set; none if that is None.

    `save_s`: seconds to write a checkpoint.
    """
    if step_s is None:
        return []
    return [*_lead_notes(config, step_s, save_s), *_timeout_notes(config, step_s)]


def _timeout_notes(config: RunConfig, step_s: float) -> list[str]:
    """A note if `run.timeout_s` is too short for exchanges that wait for a whole step; else none.

    NCCL counts from the moment at which an exchange is queued, and a host may queue a step's exchanges long before the GPU comes
    to them.
    """
    ranks = config.launcher.per_node * config.launcher.nodes
    if ranks == 1 or step_s <= LATE_SHARE * config.run.timeout_s:
        return []
    return [
        f"a step takes about {step_s:,.0f} s, and run.timeout_s={config.run.timeout_s} ends a job whose exchange takes longer, "
        f"which on GPUs counts from when it is queued; set run.timeout_s={sufficient_timeout_s(step_s)}"
    ]


def _lead_notes(config: RunConfig, step_s: float, save_s: float) -> list[str]:
    """A note if `launcher.signal_lead_s` is too short for a step and two saves; else none.

    Only SLURM sends this signal, and with 0 it sends none.
    """
    slurm = config.launcher
    if not isinstance(slurm, SlurmConfig) or not slurm.signal_lead_s:
        return []
    if step_s + 2 * save_s <= slurm.signal_lead_s:
        return []
    saves = f" and a checkpoint {save_s:,.0f} s" if save_s >= 1 else ""
    return [
        f"a step takes about {step_s:,.0f} s{saves}, longer than launcher.signal_lead_s={slurm.signal_lead_s}: at its time limit "
        "a job would be ended before it has saved, and repeat what it did since its last checkpoint; set "
        f"launcher.signal_lead_s={sufficient_signal_lead_s(step_s, save_s)}"
    ]


def sufficient_signal_lead_s(step_s: float, save_s: float) -> int:
    """`launcher.signal_lead_s` for steps and saves of so many seconds: a step plus two saves, with room, in whole minutes.

    One minute more, since SLURM may send its signal so late.
    """
    return MINUTE_S * (math.ceil((STEP_MARGIN * step_s + 2 * save_s) / MINUTE_S) + 1)


def sufficient_timeout_s(step_s: float) -> int:
    """`run.timeout_s` for steps of so many seconds, in whole minutes: no exchange of a step is then taken for late."""
    return MINUTE_S * (math.ceil(STEP_MARGIN * step_s / LATE_SHARE / MINUTE_S) + 1)


def estimated_step_s(
    config: RunConfig, flops_per_token: float, tokens: float, gpu_kinds: Iterable[str]
) -> float | None:
    """Seconds of a step of `tokens` (of all ranks together), computed for the slowest of the GPUs in `gpu_kinds`.

    `flops_per_token`: floating-point operations of forward and backward; recomputation comes on top. `gpu_kinds`: the cluster's
    names for the GPUs, such as "h100". None if a GPU or its speed is not known.
    """
    rates = [_tflops(kind, config.precision) for kind in gpu_kinds]
    if not rates or not all(rates):
        return None
    ranks = config.launcher.per_node * config.launcher.nodes
    # A second forward pass: forward is a third of forward and backward.
    recomputed = 4 / 3 if config.strategy.activation_checkpointing is ActivationCheckpointing.full else 1.0
    return recomputed * flops_per_token * tokens / (ranks * REACHED_PEAK_SHARE * min(rates) * 1e12)


def _tflops(kind: str, precision: Precision) -> float:
    """The least peak rate among the cards that a site's word may name, in TFLOP/s; 0 if it is not known."""
    cards = cards_by_gpu_kind(kind)
    if precision is Precision.fp32:
        return min((float(card["fp32_tflops"]) for card in cards), default=0.0)
    return min((peak_tflops(card["name"]) or 0.0 for card in cards), default=0.0)


def longest_step_s(config: RunConfig, gpu_kinds: Iterable[str]) -> float | None:
    """Seconds of a step whose documents are all as long as `data.max_length`; None if it cannot be computed.

    For a job that is submitted: reads the config.json of the model, and neither weights nor data. `gpu_kinds`: the cluster's
    names for the GPUs that the job may get.
    """
    settings = read_config(config.model.path) or {}
    text = settings.get("text_config") or settings
    names = ("hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size")
    if not all(isinstance(text.get(name), int) for name in names):
        return None
    width: int = text["hidden_size"]
    layers: int = text["num_hidden_layers"]
    weights = _weights_per_token(text)
    # Operations of a weight on a token: 2 forward, 2 for the gradient of its input, 2 for its own, which frozen weights lack.
    per_weight = 6.0 if isinstance(config.tuning, FullConfig) else 4.0
    length = config.data.max_length
    tokens = config.batch["global"] * length
    flops_per_token = per_weight * weights + 6.0 * layers * width * length
    return estimated_step_s(config, flops_per_token, tokens, gpu_kinds)


def _weights_per_token(text: dict[str, Any]) -> float:
    """How many weights of a decoder each token is multiplied by, from the sizes in its config.json."""
    width = text["hidden_size"]
    heads = text.get("num_attention_heads") or 1
    key_value_heads = text.get("num_key_value_heads") or heads
    head_size = text.get("head_dim") or width // heads
    # Weights of a layer.
    attention = 2 * width * head_size * (heads + key_value_heads)
    mlp = 3 * width * text["intermediate_size"]
    experts_per_token = text.get("num_experts_per_tok")
    if isinstance(experts_per_token, int):
        mlp = 3 * width * (text.get("moe_intermediate_size") or text["intermediate_size"]) * experts_per_token
    return float(text["num_hidden_layers"] * (attention + mlp) + width * text["vocab_size"])

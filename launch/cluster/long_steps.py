"""Whether settings in seconds leave room for a step of minutes: the time to save before a job's limit, and the timeout.

SLURM tells a job `launcher.signal_lead_s` before its limit. The run saves at the end of its step. If a step takes longer than
that, the job is ended in the middle of it, and the next start repeats everything since the last checkpoint.
"""

import math
from collections.abc import Iterable
from typing import Any

from launch.config.prices import cards_of_gpu_kind
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
    """Notes for the user on settings in seconds that are too short for a training step of `step_s` seconds, with what to set.

    Empty if they suffice, or if `step_s` is None (not known). `save_s`: seconds to write a checkpoint.
    """
    if step_s is None:
        return []
    return [*_signal_lead_notes(config, step_s, save_s), *_timeout_notes(config, step_s)]


def _timeout_notes(config: RunConfig, step_s: float) -> list[str]:
    """A note if `run.timeout_s`, after which a collective counts as hung, is too short for steps of `step_s` seconds; else none.

    A collective may wait for a whole step: NCCL counts from the moment at which it is queued, and a host may queue those of a
    step long before the GPU comes to them.
    """
    world_size = config.launcher.per_node * config.launcher.nodes
    leaves_room = step_s <= LATE_SHARE * config.run.timeout_s
    if world_size == 1 or leaves_room:
        return []
    return [
        f"a step takes about {step_s:,.0f} s, and run.timeout_s={config.run.timeout_s} ends a job whose exchange takes longer, "
        f"which on GPUs counts from when it is queued; set run.timeout_s={sufficient_timeout_s(step_s)}"
    ]


def _signal_lead_notes(config: RunConfig, step_s: float, save_s: float) -> list[str]:
    """A note if `launcher.signal_lead_s` is too short for a step of `step_s` seconds and two saves; else none.

    SLURM signals a job so many seconds before its time limit, and the run saves at the end of its step. Only SLURM sends this
    signal, and with 0 it sends none.
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
    """The `launcher.signal_lead_s` that suffices for steps and saves of so many seconds, in whole minutes.

    That is a step which is longer than expected (`STEP_MARGIN`), two saves, and a minute in reserve.
    """
    return MINUTE_S * (math.ceil((STEP_MARGIN * step_s + 2 * save_s) / MINUTE_S) + 1)


def sufficient_timeout_s(step_s: float) -> int:
    """`run.timeout_s` that suffices for steps of so many seconds, in whole minutes: no collective is then taken for late."""
    return MINUTE_S * (math.ceil(STEP_MARGIN * step_s / LATE_SHARE / MINUTE_S) + 1)


def estimated_step_s(
    config: RunConfig, flops_per_token: float, num_tokens: float, gpu_kinds: Iterable[str]
) -> float | None:
    """How long a training step should take, in seconds, from its operations and the peak rate of the slowest GPU it may get.

    `flops_per_token`: floating-point operations of forward and backward; recomputation comes on top.
    `num_tokens`: of a step, all ranks together.
    `gpu_kinds`: the cluster's names for the GPUs, such as "h100".
    None if there is no GPU, or the speed of one is not known.
    """
    peak_tflops_of_kinds = [_peak_tflops(kind, config.precision) for kind in gpu_kinds]
    if not peak_tflops_of_kinds or not all(peak_tflops_of_kinds):
        return None
    world_size = config.launcher.per_node * config.launcher.nodes
    # Recomputation is a second forward pass, and forward is a third of forward and backward.
    recomputes = config.strategy.activation_checkpointing is ActivationCheckpointing.full
    recomputation_factor = 4 / 3 if recomputes else 1.0
    reached_flops_per_s = world_size * REACHED_PEAK_SHARE * min(peak_tflops_of_kinds) * 1e12
    return recomputation_factor * flops_per_token * num_tokens / reached_flops_per_s


def _peak_tflops(gpu_kind: str, precision: Precision) -> float:
    """The least peak rate among the cards that a cluster's own name such as "a100" may mean, in TFLOP/s; 0 if not known."""
    cards = cards_of_gpu_kind(gpu_kind)
    if precision is Precision.fp32:
        return min((float(card["fp32_tflops"]) for card in cards), default=0.0)
    return min((peak_tflops(card["name"]) or 0.0 for card in cards), default=0.0)


def longest_step_s(config: RunConfig, gpu_kinds: Iterable[str]) -> float | None:
    """How long a step takes, in seconds, whose documents are all as long as `data.max_length`; None if it cannot be computed.

    Estimated before a job is submitted, from the config.json of the model alone: neither weights nor data are read. `gpu_kinds`:
    the cluster's names for the GPUs that the job may get.
    """
    settings = read_config(config.model.path) or {}
    text_settings = settings.get("text_config") or settings
    needed_keys = ("hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size")
    if not all(isinstance(text_settings.get(key), int) for key in needed_keys):
        return None
    hidden_size: int = text_settings["hidden_size"]
    num_layers: int = text_settings["num_hidden_layers"]
    # Operations of a weight on a token: 2 forward, 2 for the gradient of its input, 2 for its own, which frozen weights lack.
    flops_per_weight = 6.0 if isinstance(config.tuning, FullConfig) else 4.0
    document_tokens = config.data.max_length
    attention_flops_per_token = 6.0 * num_layers * hidden_size * document_tokens
    flops_per_token = flops_per_weight * _weights_per_token(text_settings) + attention_flops_per_token
    num_tokens = config.batch["global"] * document_tokens
    return estimated_step_s(config, flops_per_token, num_tokens, gpu_kinds)


def _weights_per_token(text_settings: dict[str, Any]) -> float:
    """How many weights of a decoder each token is multiplied by, for counting operations; from the sizes in its config.json.

    `text_settings`: config.json, or its block for the text model.
    Of a mixture of experts, only the experts that a token is sent to count.
    """
    hidden_size = text_settings["hidden_size"]
    num_heads = text_settings.get("num_attention_heads") or 1
    num_key_value_heads = text_settings.get("num_key_value_heads") or num_heads
    head_size = text_settings.get("head_dim") or hidden_size // num_heads
    attention_weights = 2 * hidden_size * head_size * (num_heads + num_key_value_heads)
    mlp_weights = 3 * hidden_size * text_settings["intermediate_size"]
    experts_per_token = text_settings.get("num_experts_per_tok")
    if isinstance(experts_per_token, int):
        expert_size = text_settings.get("moe_intermediate_size") or text_settings["intermediate_size"]
        mlp_weights = 3 * hidden_size * expert_size * experts_per_token
    layer_weights = text_settings["num_hidden_layers"] * (attention_weights + mlp_weights)
    return float(layer_weights + hidden_size * text_settings["vocab_size"])

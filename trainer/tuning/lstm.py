"""P-tuning's LSTM for sharded and half-precision training.

oneDNN has no bf16 LSTM for x86-64 processors without AVX-512, and raises in the forward pass. The encoder reads a few rows
only: in float32 it costs nothing that a run would notice, and rounds less.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import nn

from strategies.base import Precision
from strategies.compat.modules import lstm_weight_names, set_lstm_weights

HALF_DTYPE_BY_PRECISION = {Precision.bf16: torch.bfloat16, Precision.fp16: torch.float16}


class EncoderLstm(nn.LSTM):
    """An LSTM that looks up its weights in each forward pass, and uses float32 if this processor has no LSTM in the type."""

    def forward(self, inputs: Any, state: Any = None) -> Any:  # type: ignore[override]
        """As torch's LSTM, but with the current weights, and in float32 if this CPU has no LSTM of the wanted type.

        The output has the type of the inputs, or autocast's.
        """
        # torch's LSTM keeps a list of its weights, which strategies that replace parameters do not update.
        weights = [getattr(self, name) for name in lstm_weight_names(self)]
        set_lstm_weights(self, weights)
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else inputs.dtype
        # torch's own, unless this CPU has no LSTM of this half-precision type: then in float32.
        is_half_on_cpu = inputs.device.type == "cpu" and dtype in HALF_DTYPE_BY_PRECISION.values()
        if not is_half_on_cpu or cpu_supports_lstm_dtype(dtype):
            return super().forward(inputs, state)
        with torch.autocast("cpu", enabled=False):
            set_lstm_weights(self, [weight.float() for weight in weights])  # for this call: the next one sets them anew
            output, last = super().forward(inputs.float(), state)
        return output.to(dtype), last


@lru_cache
def cpu_supports_lstm_dtype(dtype: torch.dtype) -> bool:
    """Whether this processor has the forward and backward pass of an LSTM in `dtype`; tried out once, on a tiny one."""
    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=[]):
        lstm = nn.LSTM(4, 4, bidirectional=True)
        try:
            with torch.autocast("cpu", dtype=dtype):
                lstm(torch.zeros(1, 1, 4))[0].float().sum().backward()
            lstm.to(dtype)(torch.zeros(1, 1, 4, dtype=dtype))[0].float().sum().backward()
        except RuntimeError:
            return False
    return True


def lstm_substitutions(model: nn.Module, precision: Precision, device: torch.device) -> dict[str, str]:
    """A note for the user if the LSTMs of `model` compute in float32 instead of `precision` on this processor; {} if not.

    Such as {"tuning.encoder": "lstm in bf16 -> lstm in fp32 (...)"}.
    """
    if not any(isinstance(module, EncoderLstm) for module in model.modules()):
        return {}
    dtype = HALF_DTYPE_BY_PRECISION.get(precision)  # None in float32
    if dtype is None or device.type != "cpu" or cpu_supports_lstm_dtype(dtype):
        return {}
    return {"tuning.encoder": f"lstm in {precision} -> lstm in fp32 (this processor has no LSTM in {precision})"}

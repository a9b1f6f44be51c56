"""P-tuning's LSTM as sharded and half-precision training need it.

oneDNN has no bf16 LSTM for x86-64 processors without AVX-512, and stops in the forward pass. The encoder is a few rows beside
the model: in float32 it costs nothing that a run would notice, and rounds less.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import nn

from strategies.base import Precision
from strategies.compat.modules import lstm_weight_names, set_lstm_weights

DTYPES = {Precision.bf16: torch.bfloat16, Precision.fp16: torch.float16}


class EncoderLstm(nn.LSTM):
    """Takes its weights anew in each pass, and computes in float32 where this processor has no LSTM in the type asked for."""

    def forward(self, given: Any, state: Any = None) -> Any:  # type: ignore[override]
        # The list that an LSTM keeps of its weights is not known to strategies that replace parameters.
        weights = [getattr(self, name) for name in lstm_weight_names(self)]
        set_lstm_weights(self, weights)
        asked = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else given.dtype
        if given.device.type != "cpu" or asked not in DTYPES.values() or runs(asked):
            return super().forward(given, state)
        with torch.autocast("cpu", enabled=False):
            set_lstm_weights(self, [weight.float() for weight in weights])
            output, last = super().forward(given.float(), state)
        return output.to(asked), last


@lru_cache
def runs(dtype: torch.dtype) -> bool:
    """Whether this processor has the forward and backward pass of an LSTM in `dtype`."""
    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=[]):
        lstm = nn.LSTM(4, 4, bidirectional=True)
        try:
            with torch.autocast("cpu", dtype=dtype):
                lstm(torch.zeros(1, 1, 4))[0].float().sum().backward()
            lstm.to(dtype)(torch.zeros(1, 1, 4, dtype=dtype))[0].float().sum().backward()
        except RuntimeError:
            return False
    return True


def substituted(model: nn.Module, precision: Precision, device: torch.device) -> dict[str, str]:
    """What the LSTMs of `model` compute in instead of `precision`, where this processor makes it necessary."""
    if not any(isinstance(module, EncoderLstm) for module in model.modules()):
        return {}
    if precision not in DTYPES or device.type != "cpu" or runs(DTYPES[precision]):
        return {}
    return {"tuning.encoder": f"lstm in {precision} -> lstm in fp32 (this processor has no LSTM in {precision})"}

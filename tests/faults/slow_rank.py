"""In a rank: a clock of its own for its blocks, in which a norm takes a second, and SLOW_S more on rank SLOW_RANK.

As on a device that is hot, or a host that others use; what else this machine does is in no rank's time. It is in a module with
weights of its own, which is what is timed under every strategy.
"""

import os
from types import SimpleNamespace

from transformers.models.llama.modeling_llama import LlamaRMSNorm

from trainer.reporting import step_times

_forward, _now = LlamaRMSNorm.forward, [0.0]


def forward(self, *args, **kwargs):
    _now[0] += 1 + (os.environ["RANK"] == os.environ["SLOW_RANK"]) * float(os.environ["SLOW_S"])
    return _forward(self, *args, **kwargs)


LlamaRMSNorm.forward = forward
step_times.time = SimpleNamespace(perf_counter=lambda: _now[0])

"""In a rank: rank SLOW_RANK rests in each norm of its blocks, as on a device that is hot, or a host that others use.

In a module with weights of its own, which is what is timed under every strategy.
"""

import os
import time

from transformers.models.llama.modeling_llama import LlamaRMSNorm

_forward = LlamaRMSNorm.forward


def forward(self, *args, **kwargs):
    if os.environ["RANK"] == os.environ["SLOW_RANK"]:
        time.sleep(float(os.environ["SLOW_S"]))
    return _forward(self, *args, **kwargs)


LlamaRMSNorm.forward = forward

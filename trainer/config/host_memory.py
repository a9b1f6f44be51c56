"""What a node's memory must hold beside its processes, before the model is built: told from settings and config.json."""

from __future__ import annotations

import math
from typing import Any

from strategies.pinned_memory import GIB, expected_host_inputs, node_memory_bytes
from trainer.model.rules import read_config


def host_gib_of_recomputed_inputs(settings: dict[str, Any], ranks: int) -> float:
    """How much host memory a node needs for the inputs of recomputed blocks that its `ranks` ranks keep there, in GiB.

    0 without `strategy.offload_activations`, and if the model's config.json does not state its sizes. It is estimated before
    the model is built: documents count as long as `data.max_length` allows. `settings`: the configuration as nested dictionaries.
    """
    strategy = settings["strategy"]
    if not strategy.get("offload_activations"):
        return 0.0
    model = read_config(settings["model"]["path"]) or {}
    model = model.get("text_config") or model  # of a model that reads images, too
    width = model.get("hidden_size") or model.get("n_embd")
    blocks = model.get("num_hidden_layers") or model.get("n_layer")
    if not width or not blocks:
        return 0.0
    micro_batch = settings["batch"]["micro"]
    documents = micro_batch if isinstance(micro_batch, int) else 1  # `auto` chooses what fits
    itemsize = 4 if settings["precision"] == "fp32" else 2  # bytes of a number
    # Ranks that share a row hold a slice of it each, rounded up. A run submitted by an earlier version has no `parallel`.
    sequence_size = settings.get("parallel", {}).get("sequence", 1)
    tokens = math.ceil(documents * settings["data"]["max_length"] / sequence_size)
    host_inputs = expected_host_inputs(blocks=blocks, tokens=tokens, width=width, itemsize=itemsize)
    return node_memory_bytes(host_inputs, ranks) / GIB

"""A fault for ranks: gradients of distributed experts are divided by the ranks that hold them, and not by all."""

from strategies import expert_parallelism, fsdp2


def shard(module, ranks, **settings):
    expert_parallelism.shard_experts(module, settings["mesh"].size(), **settings)


fsdp2.shard_experts = shard

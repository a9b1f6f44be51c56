"""How many replicas a strategy makes, against the mesh that it shards over."""

import pytest

from strategies.base import Fsdp2Config, Precision, StrategyName
from strategies.errors import ConfigError
from strategies.fsdp2 import Fsdp2Strategy
from strategies.mesh import replica_count, shard_mesh
from strategies.simulation import simulated_rank

SHARDS = [("fsdp2", 1, 8), ("fsdp2", 2, 4), ("fsdp2", 4, 2), ("fsdp2", 0, 4)]
SHARDS += [("hsdp", 1, 4), ("hsdp", 2, 4), ("hsdp", 4, 2), ("hsdp", 0, 4)]


def test_ranks_among_which_a_parameter_lies():
    """Eight ranks on two hosts: as the mesh has it, and by hand."""
    with simulated_rank(0, 8, local_world_size=4) as runtime:
        for name, asked, shards in SHARDS:
            config = Fsdp2Config(name=StrategyName(name), replicate=asked)
            num_replicas = Fsdp2Strategy(config, Precision.bf16, runtime).num_replicas
            mesh = shard_mesh(runtime.device, runtime, num_replicas)
            found = mesh.size(mesh.mesh_dim_names.index("shard"))
            assert (found, 8 // replica_count(config, 8, 2)) == (shards, shards), (name, asked)


def test_replicas_divide_the_ranks():
    with pytest.raises(
        ConfigError, match=r"strategy\.replicate=3: must divide the world size 8; legal values: 1, 2, 4, 8"
    ):
        replica_count(Fsdp2Config(name=StrategyName.hsdp, replicate=3), 8, 2)

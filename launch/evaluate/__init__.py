"""`shardtune evaluate`: runs tasks on a run's checkpoint or on a model."""

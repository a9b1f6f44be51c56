"""`shardtune evaluate`: tasks of a run's checkpoint, or of a model."""

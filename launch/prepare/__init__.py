"""`shardtune prepare`: prepares the data of a run without training."""

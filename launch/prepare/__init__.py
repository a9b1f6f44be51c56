"""`shardtune prepare`: the data alone, with its audit."""

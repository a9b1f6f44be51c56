"""`shardtune download`: fetches models and data from the hub, pinned, for nodes that are offline."""

"""`shardtune download`: what a run takes from the hub, pinned, for nodes that are offline."""

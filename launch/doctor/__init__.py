"""`shardtune doctor`: checks whether this machine has what a run needs."""

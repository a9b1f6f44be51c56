"""`shardtune doctor`: what this machine has of what a run needs, and what is missing."""

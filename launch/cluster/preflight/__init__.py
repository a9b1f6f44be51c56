"""`shardtune doctor` for the nodes of a job: checks each node and their network, and names the node that differs."""

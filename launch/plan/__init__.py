"""`shardtune plan`: memory, time and price of a run before there is one."""

"""`shardtune compare`: runs side by side, out of what they left in their directories. Needs no torch."""

"""`shardtune compare`: sets runs side by side, from the files in their directories. Needs no torch."""

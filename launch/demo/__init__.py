"""`shardtune demo`: a small real model fine-tuned on real data on this machine."""

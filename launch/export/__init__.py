"""`shardtune export`: turns a checkpoint into files that plain transformers and peft load."""

"""`shardtune export`: a checkpoint of a run as files that plain transformers and peft load."""

"""`shardtune init`: writes a commented settings file, from words or from another trainer's file."""

"""`shardtune init`: writes a commented settings file, from arguments or from another trainer's file."""

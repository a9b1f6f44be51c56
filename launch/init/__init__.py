"""`shardtune init`: a commented file of settings, from words or from the file of another trainer."""

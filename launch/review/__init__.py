"""`shardtune review`: people judge answers on a blind page. Needs no torch."""

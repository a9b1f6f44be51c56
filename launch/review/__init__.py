"""`shardtune review`: people judge answers without knowing which model wrote them. Needs no torch."""

"""The prepared data on disk: token sequences, documents, shards, entries of the cache."""

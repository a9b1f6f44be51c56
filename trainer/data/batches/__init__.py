"""From prepared data to batches: order, mixing, packs, collation, loading."""

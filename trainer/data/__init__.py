"""From raw files to a memory-mapped data set of token ids and supervision, and from there to micro-batches."""

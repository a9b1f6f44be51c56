"""One attempt at a run: who owns the directory, whether it is still the same run, and what the run says of itself."""

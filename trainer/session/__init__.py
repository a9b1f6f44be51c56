"""One attempt at a run: who owns the directory, whether it is still the same run, what the run reports of itself."""

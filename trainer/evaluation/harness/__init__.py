"""lm-evaluation-harness: its tasks found and read on this machine, and our engine as the model that it asks."""

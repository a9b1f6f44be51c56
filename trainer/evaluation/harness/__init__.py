"""lm-evaluation-harness: finds and reads its tasks on this machine, and is our engine in the role of its model."""

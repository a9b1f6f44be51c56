"""`status`, `logs` and `stop`: run directories as seen by a process outside the run. Needs no torch."""

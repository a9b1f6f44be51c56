"""Starts the processes of a run (torchrun on one host, ssh on several, SLURM jobs), and restarts them if they fail."""

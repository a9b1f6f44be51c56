"""Processes: the ranks of one host by torchrun, of several by ssh, of a job by SLURM; and what starts them again."""

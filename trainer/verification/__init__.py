"""Compares a run's step as configured with the same step of one process, on a small copy of its model."""

"""Stops a run in good order: signals, and one decision of all ranks."""

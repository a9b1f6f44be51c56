"""Ending a run in good order: signals, and the decision of all ranks."""

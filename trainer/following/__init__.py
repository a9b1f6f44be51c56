"""Runs seen from outside, by a process that takes no part in them: how they stand, who runs them, what the queue says."""

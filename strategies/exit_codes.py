"""The exit codes of `shardtune`, and of its ranks: what a script or a batch system learns from the end of a command."""

DONE = 0
WRONG_SETTING = 64
"""An argument, a setting or a combination of settings cannot be used."""
WRONG_DATA = 65
"""The data cannot be read, or would teach nothing."""
CHECK_FAILED = 69
"""The command ran, and found that something is not as it must be: a run does not fit, a metric got worse, a file is damaged."""
FAILED = 70
"""Any other error."""
STORAGE_FAILED = 74
"""A file could not be written."""
PREEMPTED = 75
"""Asked to stop. What there is has been saved, and the same command goes on from it."""
INTERRUPTED = 130
"""Ctrl-C, as shells report it."""
STOPPED_CODES = (PREEMPTED, INTERRUPTED)
"""Codes of a command that was asked to stop: it neither finished nor failed."""

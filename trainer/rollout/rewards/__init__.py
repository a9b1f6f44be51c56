"""Rewards: functions of the user's files and built-in kinds, called in worker processes, and the sum of their scores."""

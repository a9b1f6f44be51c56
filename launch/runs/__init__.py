"""Run directories seen from outside, by a process that takes no part in them: `status`, `logs` and `stop`. Needs no torch."""

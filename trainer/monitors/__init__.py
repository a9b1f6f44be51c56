"""Monitors of a run: outlying steps, divergence, overfitting, forgetting, degenerate answers, slow ranks."""

"""Optimizers: parameter groups, construction, and the strategies that each runs under."""

"""Evaluators: each runs the model without gradients and yields (name, value)."""

"""Evaluators: small things that run the model without gradients and yield (name, value)."""

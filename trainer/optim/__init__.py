"""Optimizers: parameter groups, construction, what each needs of a strategy."""

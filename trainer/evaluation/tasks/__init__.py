"""Tasks that ask a model for more than its loss: one family a module, and their registry."""

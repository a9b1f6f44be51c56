"""Tasks: what is asked of a model beyond its loss, one family a module, and the registry that knows them."""

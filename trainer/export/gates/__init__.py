"""Gates: bounds on measured metrics of a model that must hold before it is released."""

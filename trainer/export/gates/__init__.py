"""Bounds on what was measured of a model, which must hold before it is given to others."""

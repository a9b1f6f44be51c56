"""Ships the YAML of the configuration groups."""

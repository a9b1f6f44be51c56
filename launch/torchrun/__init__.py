"""`python -m launch.torchrun`: starts the ranks of one node. Scripts that people have copied call it by this name."""

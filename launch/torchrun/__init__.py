"""`python -m launch.torchrun`: the ranks of one node. Job scripts that people have copied call it by this name."""

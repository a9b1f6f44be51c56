"""`python -m launch.job`: the commands of a job script. Scripts that people have copied call it by this name."""

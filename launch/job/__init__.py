"""`python -m launch.job`: what a job script asks of Python. Scripts that people have copied call it by this name."""

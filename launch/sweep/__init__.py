"""Several runs from one command line: `train -m`, and searches by Optuna or W&B."""

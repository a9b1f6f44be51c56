"""Several runs from one command line: `train -m`, and searches by optuna or W&B."""

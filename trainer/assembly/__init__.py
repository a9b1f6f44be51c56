"""The parts of a run out of its configuration, which `trainer/run.py` and `trainer/evaluate.py` put together."""

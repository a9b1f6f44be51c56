"""The parts of a run, made from its configuration: data, model, engine, batches. `trainer/run.py` puts them together."""

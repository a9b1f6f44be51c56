"""Makes the parts of a run from its configuration: data, model, engine, batches. `trainer/run.py` joins them."""

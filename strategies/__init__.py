"""How one training step is spread over processes: the bottom layer, and the only place that imports deepspeed or FSDP."""

"""How one training step is spread over processes: the bottom layer, and the only place that imports deepspeed or FSDP."""

from strategies.compat.library_messages import hide_harmless_messages

# Each process of a run imports this package before the libraries whose messages are meant, also one that only simulates a step.
hide_harmless_messages()

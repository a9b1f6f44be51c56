"""Which parameters train, and how adapters are added, initialised and merged. The only place that imports peft."""

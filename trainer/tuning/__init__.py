"""Tuning methods: which parameters train, and how adapters are added, initialised and merged."""

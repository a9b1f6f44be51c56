"""Writes models and adapters for others: verified, combined, quantised, and released only if their gates hold."""

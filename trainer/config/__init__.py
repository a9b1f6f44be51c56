"""The whole configuration of a run, the rules between its parts, and what works with what."""

"""Resumable training state on disk: when it is written, how it is sealed, which one is trusted, which are kept."""

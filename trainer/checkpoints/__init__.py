"""Resumable training state on disk: when it is written, how it is verified, which one is resumed, which are kept."""

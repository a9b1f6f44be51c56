"""Prepared data on disk: token sequences and documents."""

"""Personal data in training text: found by type, reported, redacted or pseudonymised."""

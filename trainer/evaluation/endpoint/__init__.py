"""Models behind an OpenAI-compatible address: one judges answers, one writes them in place of the local model."""

"""Models behind an OpenAI-compatible address: one that judges answers, one that writes them in place of the model here."""

"""The exported model for people and programs: in the terminal, and behind an OpenAI-compatible address."""

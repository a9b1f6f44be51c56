"""People judge: prompts drawn and answered, a blind page and table to fill in, and what the votes say. Needs no torch."""

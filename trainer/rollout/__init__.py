"""Rounds of online reinforcement learning: prompts, answers that the model writes, rewards, and batches made of them."""

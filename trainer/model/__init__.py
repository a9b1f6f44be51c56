"""The model: its settings, tokenizer, architecture, weights, attention and quantised bases."""

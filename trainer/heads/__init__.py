"""What is computed over hidden states at the output layer: the next-token loss, and divergences from another model."""

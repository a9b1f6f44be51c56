"""Losses over hidden states, fused with the output layer: next token, divergence from another model, z-loss."""

"""What may go wrong with a run: overfitting, forgetting, degenerate answers, instability; each found by itself."""

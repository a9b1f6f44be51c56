"""What watches a run: steps that stand out, divergence, overfitting, forgetting, degenerate answers, slow ranks."""

"""Steps that need the whole data set, on columns of numbers: copies, held-out splits, leakage, balance."""

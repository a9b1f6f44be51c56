"""What needs the whole data set, decided from columns of numbers: copies, held-out splits, leakage, balance."""

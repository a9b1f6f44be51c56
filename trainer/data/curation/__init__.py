"""What is kept of the data and how much of it: cleaning, filters, duplicates, leakage, balance, bias."""

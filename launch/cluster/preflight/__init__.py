"""Whether the nodes of a job can run it: what each sees, how they exchange, and which one is the odd one out."""

"""What is learned: each objective turns a batch into sums, and a sample into the counts that divide them."""

"""Objectives: each turns a batch into sums of losses, and a sample into the counts that divide them."""

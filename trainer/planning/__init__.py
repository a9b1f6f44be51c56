"""What a run will take, before there is one: memory and what is recomputed."""

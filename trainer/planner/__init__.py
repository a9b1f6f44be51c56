"""What a run will take, found by simulating it: memory, time, the strategy and micro-batch that fit."""

"""Predicts what a run will take by simulating it: memory, time, and the strategy and micro-batch that fit."""

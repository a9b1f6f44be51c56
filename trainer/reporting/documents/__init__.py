"""Documents about a model (card, datasheet, annexes), filled from what its run recorded and its owner answered."""

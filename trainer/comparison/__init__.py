"""Finished and unfinished runs side by side, out of what they left in their directories; needs no torch."""

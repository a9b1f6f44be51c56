"""The life of a run: which attempt owns it, whether it is still the same run, and what it leaves when it ends."""

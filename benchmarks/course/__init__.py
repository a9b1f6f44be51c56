"""The experiments of the lessons: small real runs, three seeds each, kept with their numbers."""

"""What users of other trainers write, in our words: names of settings, their values, whole files. Needs no torch."""

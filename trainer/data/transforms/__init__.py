"""Steps that look at one document at a time: checks, cleaning, filters, personal data, decontamination."""

"""What is done to one document at a time: checks, cleaning, filters, personal data, decontamination."""

"""From documents to tokens and the mask of what is learned: template, encoding, truncation."""

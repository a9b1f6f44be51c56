"""From documents to tokens and the marks of what is learned: template, encoding, over-length."""

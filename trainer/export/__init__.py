"""Files for others: written, verified, combined, and described by a card."""

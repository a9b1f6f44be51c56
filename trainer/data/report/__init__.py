"""What people read about a prepared data set: audit page, data card, terminal."""

"""Words of the command line become one typed, frozen configuration; and what of it a verb may trust."""

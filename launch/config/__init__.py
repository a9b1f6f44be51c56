"""Turns the arguments of the command line into one typed, frozen configuration, and reads that of other people's runs."""

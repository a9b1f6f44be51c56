"""What is typed and what files say, made into a checked configuration."""

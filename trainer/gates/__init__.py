"""What must be true of a model before it is given to others: bounds in the configuration, judged by what was measured."""

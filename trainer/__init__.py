"""What training runs: model, data, tuning, objective, loop, evaluation, reporting and export, over any strategy."""

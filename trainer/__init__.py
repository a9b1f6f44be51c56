"""The trainer: model, data, tuning, objective, loop, evaluation, records and export, over any strategy."""

"""Command lines: arguments, data, checks before anything loads, and the start of a run."""

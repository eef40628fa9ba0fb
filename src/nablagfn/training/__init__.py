"""One run: the loop, its updates, its checkpoints, its guard, and who watches it."""

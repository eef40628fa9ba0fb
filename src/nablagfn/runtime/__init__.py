"""The machine under a run: processes, memory, optimizers, and what operations cost."""

"""The mathematics that every method shares; it needs torch only."""

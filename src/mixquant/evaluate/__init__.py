"""Evidence of quality: tasks, arms, divergence and the runner that puts them together."""

RESULTS_VERSION = 2
"""Of the results files that this release writes and reads."""

"""Evidence of quality: tasks, arms, divergence and the runner that puts them together."""

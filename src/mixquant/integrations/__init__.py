"""Leaves of the project: the only modules that import an engine; each is opened by name."""

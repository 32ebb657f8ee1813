"""What a user types, one module a command; `mixquant.cli` parses and calls."""

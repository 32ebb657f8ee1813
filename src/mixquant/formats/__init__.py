"""Number formats as readable references: they define the truth that every kernel is compared to."""

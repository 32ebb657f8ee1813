"""A folder on disk: what MODEL is, `mixquant.json`, and readers of quantized weights."""

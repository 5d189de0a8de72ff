"""One module, one pass."""

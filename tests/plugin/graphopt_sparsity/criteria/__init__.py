"""One module, one criterion."""

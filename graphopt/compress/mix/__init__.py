"""Several precisions in one model."""

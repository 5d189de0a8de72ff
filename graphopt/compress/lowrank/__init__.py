"""Weights as products of two thin ones."""

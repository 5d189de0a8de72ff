"""Whole heads, neurons and features: what they matter, which go, and what makes up for them."""

"""Metrics by name: one file each, and its class has the name of the file. A larger number is a better model."""

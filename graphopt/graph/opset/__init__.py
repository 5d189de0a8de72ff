"""Versions of the standard: what a node needs, and the same node in older and newer forms."""

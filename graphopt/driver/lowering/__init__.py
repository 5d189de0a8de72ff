"""Equivalent spellings of a graph, timed on the machine."""

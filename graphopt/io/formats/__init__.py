"""The forms in which a model comes: one file for each kind, named in FORMATS of io/load.py."""

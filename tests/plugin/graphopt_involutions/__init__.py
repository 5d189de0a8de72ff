"""Passes that remove operations which undo each other."""

"""The writers of elements, one file a format."""

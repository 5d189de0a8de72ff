"""The doors: files, modules and folders in, artifacts out."""

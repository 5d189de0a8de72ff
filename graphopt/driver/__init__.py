"""One run from the source to the artifact."""

"""Facts seen on samples."""

"""What lossy passes share; plugins may use it."""

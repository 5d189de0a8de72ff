"""What each operator computes in torch."""

"""A pass that puts zeros where they matter least, and a criterion of what matters."""

"""One file = one target; the only folder where vendor operators are named."""

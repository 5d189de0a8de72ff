"""`python -m graphopt` is the `graphopt` command."""

from __future__ import annotations

from graphopt.cli.root import main

if __name__ == "__main__":
    main()

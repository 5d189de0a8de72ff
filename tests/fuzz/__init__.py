"""Fuzzing: generators, one module each; the judge; the process in which it works. `python benchmarks/fuzz.py` is the long mode."""

"""When something is wrong: checks of a graph, the smallest graph that still fails, and what reproduces an error."""

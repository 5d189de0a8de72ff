"""The passes behind which a graph is read for a report, as text."""

from __future__ import annotations

RECOGNIZE = "canonicalize"  # attention facts are read off the graph in its one spelling
FUSE = "simplify-masks, fuse-norm, fuse-activation, fuse-rotary, fuse-attention"  # and the blocks off the fused graph

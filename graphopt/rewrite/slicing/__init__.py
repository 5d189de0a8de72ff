"""Remove indices along axes of a graph, with all that this entails: heads, neurons, features, vocabulary rows.

A removal starts at some axis of some value and is closed over the graph: what a MatMul contracts goes on both sides, what an Add aligns goes
in both terms, a Reshape carries heads into features, a Split into its parts. The closure ends at stored weights, which are sliced, and at
contractions, whose result does not change its size. So the pruned graph computes what the old one would if the removed entries were zero
where they are summed. What has no rule refuses; nothing is guessed from sizes.

    s = Slicing(model)
    s.remove(value, axis, mask)  # Refusal: it cannot be done
    graphopt.rewrite.slicing.apply.apply(s)
"""

from __future__ import annotations

from graphopt.rewrite.slicing.close import Slicing
from graphopt.rewrite.slicing.plan import Refusal, Remedy, Slot, factor, is_ragged, kept, spread

__all__ = ["Refusal", "Remedy", "Slicing", "Slot", "factor", "is_ragged", "kept", "spread"]

"""Every rule of canonicalize gives the same function, over its whole domain."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable

import pytest
from canonical_domains import DOMAINS  # type: ignore[import-not-found]
from equivalence import fired, proved  # type: ignore[import-not-found]

COUNT = 40


@pytest.mark.parametrize("domain", DOMAINS, ids=lambda d: d.__name__)
def test_the_rule_gives_the_same_function(domain: Callable[..., None]) -> None:
    found = proved(domain, "canonicalize", COUNT)
    rule = domain.__name__.replace("_", " ")
    assert fired(found, rule) >= COUNT // 12, f"{rule} fired {fired(found, rule)} times in {COUNT} graphs: the domain misses it"


def test_a_wrong_rule_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The square root of a number is not the number: the proof says so, and shows the graphs."""
    algebra = importlib.import_module("graphopt.passes._algebra")
    power = algebra.power
    rules = importlib.import_module("graphopt.passes.canonicalize")._RULES
    monkeypatch.setitem(rules, "Pow", (lambda node, op: None if power(node, op) is None else algebra.stand_in(node, node.inputs[0], op),))
    with pytest.raises(AssertionError, match="off by"):
        proved(DOMAINS[4], "canonicalize", COUNT)


def test_every_rule_has_a_domain() -> None:
    rules = importlib.import_module("graphopt.passes.canonicalize")._RULES
    names = {rule.__name__ for rule in itertools.chain.from_iterable(rules.values())}
    assert names <= {domain.__name__ for domain in DOMAINS}

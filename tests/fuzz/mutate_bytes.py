"""Damage to the bytes of a file: bits flipped, ends cut off, bytes put in, pieces of another file."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

_VALUES = (0x00, 0x01, 0x7F, 0x80, 0xFF, 0x0A, 0x12, 0x08)  # among them the tags that protobuf uses most
_KINDS = ("flip", "flip", "flip", "set", "set", "truncate", "insert", "delete", "repeat", "splice")


def plan(rng: Random) -> tuple[str, ...]:
    """One to four mutations as text: the kind and the seed of its places."""
    return tuple(f"{rng.choice(_KINDS)} {rng.randrange(1 << 30)}" for _ in range(rng.choice((1, 1, 2, 3, 4))))


def apply(data: bytes, mutations: Sequence[str], other: bytes) -> bytes:
    """`other` is the file that pieces are taken from."""
    for text in mutations:
        kind, _, seed = text.partition(" ")
        data = _mutated(bytearray(data), kind, Random(int(seed)), other)
    return data


def _mutated(data: bytearray, kind: str, rng: Random, other: bytes) -> bytes:
    if not data:
        return bytes(data)
    at = rng.randrange(len(data))
    length = rng.choice((1, 1, 2, 3, 8, 40))
    if kind == "flip":
        data[at] ^= 1 << rng.randrange(8)
    elif kind == "set":
        data[at] = rng.choice(_VALUES)
    elif kind == "truncate":
        del data[at:]
    elif kind == "insert":
        data[at:at] = bytes(rng.choice(_VALUES) if rng.random() < 0.5 else rng.randrange(256) for _ in range(length))
    elif kind == "delete":
        del data[at : at + length]
    elif kind == "repeat":
        data[at:at] = data[at : at + length] * rng.choice((1, 2, 50))
    else:
        start = rng.randrange(len(other))
        data[at : at + rng.choice((0, length))] = other[start : start + length * 4]
    return bytes(data)

"""What the models of the zoo are fed: for every kind of input the same hard cases."""

from __future__ import annotations

import dataclasses
from typing import Any

VOCABULARY, WIDTH, HEADS, HEAD_DIM = 128, 64, 4, 16
IMAGE, MELS = 32, 16
AXES = {
    "input_ids": ("batch", "seq"), "attention_mask": ("batch", "seq"), "bbox": ("batch", "seq"), "decoder_input_ids": ("batch", "dec_seq"),
    "decoder_attention_mask": ("batch", "dec_seq"), "pixel_values": ("batch",), "large_image": ("batch",),
    "input_features": ("batch",), "input_values": ("batch", "samples"),
    "spectrogram": ("batch",), "x": ("batch", "seq"), "padding": ("batch", "seq"), "memory": ("batch", "seq"), "target": ("batch", "dec_seq"),
    "bias": ("seq", "seq_k"), "visual_feats": ("batch",), "visual_pos": ("batch",), "speech": ("batch", "samples"),
    "speech_mask": ("batch", "samples"),
}  # fmt: skip
INPUTS = {
    "text": ("input_ids", "attention_mask"), "layout": ("input_ids", "bbox", "attention_mask"), "ids": ("input_ids",),
    "past": ("input_ids", "attention_mask"), "seq2seq": ("input_ids", "attention_mask", "decoder_input_ids"), "image": ("pixel_values",),
    "large image": ("large_image",),
    "audio": ("input_features", "decoder_input_ids"), "wave": ("input_values",), "wave+mask": ("speech", "speech_mask"), "mel": ("spectrogram",),
    "tensor": ("x",), "tensor+padding": ("x", "padding"), "tensor+bias": ("x", "bias"), "pair": ("memory", "target"),
    "text+image": ("input_ids", "attention_mask", "pixel_values"),
    "text+regions": ("input_ids", "attention_mask", "visual_feats", "visual_pos"),
}  # fmt: skip
CALLED = {
    "large_image": "pixel_values",
    "spectrogram": "input_values",
    "speech": "input_values",
    "speech_mask": "attention_mask",
}  # the keyword that the model itself uses


@dataclasses.dataclass(frozen=True)
class Case:
    """One feed: sizes, the kind of mask, and how many keys the cache holds."""

    batch: int
    length: int
    mask: str = "ones"
    past: int = 0

    def __str__(self) -> str:
        return f"b{self.batch} s{self.length} {self.mask}" + (f" p{self.past}" if self.past else "")


MASKED = (Case(2, 12, "right"), Case(1, 7), Case(2, 12, "left"), Case(5, 7, "holes"), Case(2, 7, "empty"), Case(5, 12))
CACHED = (
    Case(2, 3, "right", 6), Case(2, 7, "left"), Case(1, 1, "ones", 5), Case(5, 3, "holes", 5), Case(2, 2, "left", 6), Case(2, 3, "empty", 6),
    Case(1, 7),
)  # fmt: skip
PLAIN = (Case(2, 12), Case(1, 7), Case(5, 12), Case(5, 7))
STILL = (Case(2, 12), Case(1, 12), Case(5, 12))  # nothing but the batch can vary


def cases(kind: str) -> tuple[Case, ...]:
    """The feeds of a kind of input; the first one is the example that the exporter sees."""
    if kind == "past":
        return CACHED
    if kind in ("image", "large image", "mel"):
        return STILL
    return MASKED if {"attention_mask", "padding", "speech_mask"} & set(INPUTS[kind]) else PLAIN


def feed(kind: str, case: Case, seed: int, *, layers: int = 0, kv_heads: int = 0, head_dim: int = HEAD_DIM) -> dict[str, Any]:
    """Named tensors for one case. Token ids avoid the special tokens 0 to 3 (padding, begin, end) of every configuration here."""
    import torch

    torch.manual_seed(seed)
    made = {name: _value(name, case) for name in INPUTS[kind]}
    for layer in range(layers):
        for part in ("key", "value"):
            made[f"past.{layer}.{part}"] = torch.randn(case.batch, kv_heads, case.past, head_dim)
    return made


def axes(name: str, kind: str) -> dict[int, str]:
    """The axes of an input that may change from feed to feed, with a name for each; equal names are equal sizes."""
    if kind == "past" and name == "attention_mask":
        return {0: "batch", 1: "total"}
    if name.startswith("past."):
        return {0: "batch", 2: "past"}
    return dict(enumerate(AXES[name]))


def _value(name: str, case: Case) -> Any:
    import torch

    b, s = case.batch, case.length
    d = 5 if s > 7 else 9  # the length of the decoder differs from the one of the encoder
    if name in ("input_ids", "decoder_input_ids"):
        return torch.randint(4, VOCABULARY - 1, (b, s if name == "input_ids" else d))
    if name == "attention_mask":
        return mask(case, s + case.past)
    if name == "speech_mask":
        return mask(case, 80 * s)
    if name == "padding":
        return mask(case, s) == 0  # torch's layers mark what is *not* to be seen
    if name == "bbox":
        corner = torch.randint(0, 50, (b, s, 2))
        return torch.cat([corner, corner + torch.randint(1, 40, (b, s, 2))], -1)
    if name == "bias":
        return torch.randn(s, s)
    shapes = {
        "pixel_values": (b, 3, IMAGE, IMAGE), "large_image": (b, 3, 2 * IMAGE, 2 * IMAGE),
        "input_features": (b, MELS, 64), "input_values": (b, 1600 if s > 7 else 2400), "speech": (b, 80 * s),
        "spectrogram": (b, 40, MELS), "x": (b, s, WIDTH), "memory": (b, s, WIDTH), "target": (b, d, WIDTH), "visual_feats": (b, 6, 24),
        "visual_pos": (b, 6, 4),
    }  # fmt: skip
    return torch.randn(*shapes[name])


def mask(case: Case, length: int) -> Any:
    """1 = seen, 0 = masked, [batch, length]; every row differs from the next. `empty` masks the whole first row."""
    import torch

    seen = torch.ones(case.batch, length, dtype=torch.long)
    for row in range(case.batch):
        count = (row + 1) * length // (case.batch + 1)
        if case.mask == "left":
            seen[row, :count] = 0
        if case.mask == "right":
            seen[row, length - count :] = 0
        if case.mask == "holes":
            seen[row, torch.randperm(length - 1)[: length // 3] + 1] = 0
        if case.mask == "empty" and row == 0:
            seen[row] = 0
    return seen

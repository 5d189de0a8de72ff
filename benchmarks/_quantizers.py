"""The quantizers compared: each writes OUT for a float32 file SOURCE, and may calibrate on samples (feeds of the model)."""

from __future__ import annotations

import functools
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

import graphopt

Samples = Sequence[dict[str, Any]]
Quantizer = Callable[[Path, Path, Samples], None]
EXACT = "canonicalize, simplify, simplify-masks, canonicalize, fuse-norm, fuse-activation, fuse-rotary, fuse-attention"


class _Reader:
    """What onnxruntime calibrates on."""

    def __init__(self, samples: Samples) -> None:
        self._left: Iterator[dict[str, Any]] = iter(samples)

    def get_next(self) -> dict[str, Any] | None:
        return next(self._left, None)

    def set_range(self, start_index: int, end_index: int) -> None:
        raise NotImplementedError("the samples fit into memory at once")


def _even(samples: Samples) -> Samples:
    """Batches of one shape, for calibrators that cannot take others: rows padded with zeros, a smaller last batch left out."""
    batch, length = (max(feed["input_ids"].shape[axis] for feed in samples) for axis in (0, 1))
    whole = [feed for feed in samples if len(feed["input_ids"]) == batch]
    return [{name: np.pad(array, ((0, 0), (0, length - array.shape[1]))) for name, array in feed.items()} for feed in whole]


def dynamic(source: Path, out: Path, samples: Samples) -> None:
    """onnxruntime quantize_dynamic, per channel, tables too."""
    from graphopt.cli.demo_race import quantize_dynamic

    quantize_dynamic(source, out)


def static(source: Path, out: Path, samples: Samples, method: str = "MinMax", *, all_operators: bool = False) -> None:
    """onnxruntime quantize_static as QDQ, per channel, uint8 activations: products with stored weights and tables only, results in float, which
    keeps this model best; or all operators that it knows, its default."""
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory() as folder:
        ready = Path(folder, "ready.onnx")
        quant_pre_process(str(source), str(ready), skip_symbolic_shape=True)
        narrow = {} if all_operators else {"MatMulConstBOnly": True, "OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm", "Gather"]}
        quantize_static(
            ready, out, _Reader(samples if method == "MinMax" else _even(samples)), quant_format=QuantFormat.QDQ, per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8, calibrate_method=CalibrationMethod[method],
            op_types_to_quantize=None if all_operators else ["MatMul", "Gemm", "Gather"], extra_options={"CalibPercentile": 99.999, **narrow},
        )  # fmt: skip


def nbits(source: Path, out: Path, samples: Samples, bits: int = 4, *, hqq: bool = False, level: int | None = None) -> None:
    """onnxruntime MatMulNBitsQuantizer, block 32 (4 bits) or 64, symmetric; products and tables. (Its GPTQ wants neural-compressor.)"""
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, HQQWeightOnlyQuantConfig, MatMulNBitsQuantizer

    block, operators = (32, ("MatMul", "Gather")) if bits == 4 else (64, ("MatMul",))  # it has tables in 4 bits only
    axes = (("MatMul", 0), ("Gather", 1))
    if hqq:
        config: Any = HQQWeightOnlyQuantConfig(block_size=block, bits=bits, op_types_to_quantize=("MatMul",))
    else:
        config = DefaultWeightOnlyQuantConfig(
            block_size=block, bits=bits, is_symmetric=True, accuracy_level=level, op_types_to_quantize=operators, quant_axes=axes
        )
    made = MatMulNBitsQuantizer(onnx.load(source), algo_config=config)
    made.process()
    onnx.save(made.model.model, out)


def onnxsim(source: Path, out: Path, samples: Samples, kind: str = "dynamic") -> None:
    """onnxsim's own quantizers, with its defaults, behind its simplify (weights behind a Transpose are not quantized otherwise)."""
    import onnxsim as package

    model = package.simplify(onnx.load(source))[0]
    make = {
        "dynamic": package.quantize_dynamic,
        "static": functools.partial(package.quantize_static, calibration_data=list(samples)),
        "4 bit": package.quantize_weight_only_matmul_nbits,
    }[kind]
    onnx.save(make(model), out)


def nncf(source: Path, out: Path, samples: Samples, kind: str = "static", *, python: Path) -> None:
    """NNCF in its own environment: nncf.quantize(model_type=TRANSFORMER), or compress_weights (int8_sym, int4_sym with groups of 32)."""
    with tempfile.TemporaryDirectory() as folder:
        stored = Path(folder, "samples.npz")
        np.savez(stored, **{f"{number}|{name}": array for number, feed in enumerate(samples) for name, array in feed.items()})
        worker = Path(__file__).with_name("_nncf.py")
        done = subprocess.run([python, "-P", worker, source, stored, out, kind], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["nncf failed"])[-1])


def ours(source: Path, out: Path, samples: Samples, text: str = "quantize") -> None:
    """graphopt: the exact fusions, then `text`."""
    graphopt.optimize(source, f"{EXACT}, {text}", target="quantized{tune=off}", samples=list(samples), promise=False).save(out)


def quantizers(python: Path | None, four_bits: str) -> dict[str, Quantizer]:
    """By name; `python`: the interpreter with NNCF; `four_bits`: graphopt's pipeline for 4 bits with GPTQ."""
    table: dict[str, Quantizer] = {
        "onnxruntime quantize_dynamic": dynamic,
        "onnxruntime quantize_static, minmax": static,
        "onnxruntime quantize_static, percentile 99.999": functools.partial(static, method="Percentile"),
        "onnxruntime quantize_static, its defaults": functools.partial(static, all_operators=True),
        "onnxruntime MatMulNBits 8 bit": functools.partial(nbits, bits=8),
        "onnxruntime MatMulNBits 4 bit": nbits,
        "onnxruntime MatMulNBits 4 bit HQQ": functools.partial(nbits, hqq=True),
        **{f"onnxsim {kind}": functools.partial(onnxsim, kind=kind) for kind in ("dynamic", "static", "4 bit")},
    }
    if python is not None:
        kinds = {"NNCF quantize": "static", "NNCF compress_weights 8 bit": "8", "NNCF compress_weights 4 bit": "4"}
        table |= {name: functools.partial(nncf, kind=kind, python=python) for name, kind in kinds.items()}
    own = {
        "dynamic": "quantize",
        "rows=true": "quantize{rows=true}",
        "static": "quantize{mode=static}",
        "static, bias-correction": "quantize{mode=static bias-correction=true}",
        "smoothed, dynamic": "smooth{multiply=true}, quantize",
        "smoothed, rows=true": "smooth{rows=true multiply=true}, quantize{rows=true}",
        "smoothed, static, bias-correction": "smooth{multiply=true}, quantize{mode=static bias-correction=true}",
        "8 bit": "quantize{mode=weight-only block=64}",
        "4 bit gptq": four_bits,
    }
    return table | {f"graphopt {name}": functools.partial(ours, text=text) for name, text in own.items()}

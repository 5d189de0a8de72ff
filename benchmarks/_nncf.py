"""NNCF in an interpreter of its own: PYTHON _nncf.py MODEL.onnx SAMPLES.npz OUT.onnx static|8|4.

SAMPLES holds the feeds as `NUMBER|INPUT`. Prints what NNCF says; the version goes to stdout.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import onnx


def main(source: str, samples: str, out: str, kind: str) -> None:
    import nncf

    model: Any = onnx.load(source)
    if kind == "static":
        feeds: dict[str, dict[str, Any]] = {}
        with np.load(samples) as stored:
            for key in stored:
                number, _, name = key.partition("|")
                feeds.setdefault(number, {})[name] = stored[key]
        rows = list(feeds.values())
        made = nncf.quantize(model, nncf.Dataset(rows), model_type=nncf.ModelType.TRANSFORMER, subset_size=len(rows))
    elif kind == "8":
        made = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_SYM)
    else:
        made = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT4_SYM, group_size=32)
    onnx.save(made, out)
    print(f"nncf {nncf.__version__}")


if __name__ == "__main__":
    main(*sys.argv[1:])

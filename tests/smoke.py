"""The installed package by itself, without the sources around: run from another directory by .ci/run."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import onnx

MODEL = """
<ir_version: 8, opset_import: ["" : 17]>
block (float[batch, 8] x) => (float[batch, 8] y)
<float[8, 8] w = {WEIGHTS}>
{
  h = MatMul(x, w)
  r = Constant<value: tensor = float {1.4142135}>()
  d = Div(h, r)
  e = Erf(d)
  one = Constant<value: tensor = float {1.0}>()
  p = Add(e, one)
  m = Mul(h, p)
  half = Constant<value: tensor = float {0.5}>()
  y = Mul(m, half)
}
""".replace("WEIGHTS", ", ".join(str((k * 7 % 13 - 6) / 10) for k in range(64)))


def graphopt(*arguments: str) -> str:
    """Run the installed script and give its stdout."""
    script = Path(sys.executable).with_name("graphopt")
    return subprocess.run([script, *arguments], capture_output=True, text=True, check=True).stdout


def main() -> None:
    import graphopt as package
    from graphopt.core.registry import passes, targets

    home = Path(package.__file__).resolve().parent
    assert "site-packages" in home.parts, f"expected the installed package, found {home}"
    assert "fuse-attention" in graphopt("passes")
    assert "quantized" in graphopt("targets")
    for known in (passes(), targets()):
        assert all(known[name] for name in known)  # imports each
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder, "in.onnx"), Path(folder, "out.onnx")
        onnx.save(onnx.parser.parse_model(MODEL), source)
        report = json.loads(graphopt("optimize", str(source), "-o", str(out), "--require", "fuse-activation", "--no-measure", "--json"))
        assert report["changes"] > 0, report
        assert [node.op_type for node in onnx.load(out).graph.node] == ["MatMul", "Gelu"]
        assert "Gelu" in graphopt("inspect", str(out))
    print(f"the installed wheel works: {home}")


if __name__ == "__main__":
    main()

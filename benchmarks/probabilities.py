"""What rounding the attention probabilities of MiniLM costs, and what integer scores and probabilities would gain.

Run by hand: `pip install -e '.[demo]'`, then `python benchmarks/probabilities.py [--speed]`. Prints the tables of docs/benchmarks.md: linear and
power-of-two codes side by side, alone and beside int8 weights; with --speed one attention of MiniLM's sizes (12 heads of 32) whose products of
two activations compute in floats or in integers, in standard operators, one thread, interleaved, processor time.
"""

from __future__ import annotations

import sys

import numpy as np
import onnx

import graphopt
from graphopt.cli import demo_race as demo
from graphopt.run.clock import steady_clock
from graphopt.run.ort import session
from graphopt.run.race import Picky, race

CODES = ("", "bits=8", "codes=log bits=4", "codes=log bits=3", "bits=4")
AFTER = {"float32": "", "int8 weights": ", fuse-norm, fuse-activation, quantize{mode=dynamic}"}
SHAPES = ((1, 16), (1, 128), (8, 64), (1, 512))
FLOAT_SCORES = "t = MatMul(q, r)"
INTEGER_SCORES = """qi, qs, qz = DynamicQuantizeLinear(q)
  ri, rs, rz = DynamicQuantizeLinear(r)
  ti = MatMulInteger(qi, ri, qz, rz)
  tf = Cast <to = 1> (ti)
  ts = Mul(qs, rs)
  t = Mul(tf, ts)"""
FLOAT_VALUES = "y = MatMul(p, v)"
INTEGER_VALUES = """pi = QuantizeLinear(p, step, zero)
  vi, vs, vz = DynamicQuantizeLinear(v)
  yi = MatMulInteger(pi, vi, zero, vz)
  yf = Cast <to = 1> (yi)
  ys = Mul(vs, step)
  y = Mul(yf, ys)"""
PRODUCTS = {
    "float products": (FLOAT_SCORES, FLOAT_VALUES),
    "integer scores": (INTEGER_SCORES, FLOAT_VALUES),
    "integer probabilities": (FLOAT_SCORES, INTEGER_VALUES),
    "both": (INTEGER_SCORES, INTEGER_VALUES),
}


def attention(scores: str, values: str) -> onnx.ModelProto:
    return onnx.parser.parse_model(f"""<ir_version: 10, opset_import: ["": 23]>
    g (float[B,12,S,32] q, float[B,12,S,32] k, float[B,12,S,32] v) => (float[B,12,S,32] y) <float c = {{0.17677669}}, float step = {{0.0039215686}}, uint8 zero = {{0}}> {{
      r = Transpose <perm = [0, 1, 3, 2]> (k)
      {scores}
      s = Mul(t, c)
      p = Softmax <axis = -1> (s)
      {values}
    }}""")  # noqa: E501


def speed() -> None:
    sessions = {name: session(attention(*parts)) for name, parts in PRODUCTS.items()}
    rng = np.random.default_rng(0)
    feeds = {f"{b}x{s}": {name: rng.standard_normal((b, 12, s, 32)).astype(np.float32) for name in "qkv"} for b, s in SHAPES}
    timings = race(sessions, feeds, clock=steady_clock(1))
    print(f"| attention | ms at {' '.join(timings.shapes)} | speed-up at each |\n|---|---|---|")
    for name, seconds in timings.seconds.items():
        print(f"| {name} | {' '.join(f'{1e3 * t:.3f}' for t in seconds)} | {' '.join(f'{r:.2f}x' for r in timings.ratios(name))} |")


def main() -> None:
    if "--speed" in sys.argv:
        speed()
        return
    folder, (texts, human) = demo._model_dir(), demo._lee()
    base = None
    print("| probabilities | " + " | ".join(f"Pearson, {name} | cosine, {name}" for name in AFTER) + " |")
    print("|---" * (1 + 2 * len(AFTER)) + "|")
    for codes in CODES:
        cells = []
        for rest in AFTER.values():
            step = f", quantize-probabilities{{{codes}}}" if codes else ""
            result = graphopt.optimize(folder, f"canonicalize{step}{rest}", target="quantized{tune=off}", promise=False)
            found = demo.embed(Picky(session(result.model)), folder / "tokenizer.json", texts)
            base = found if base is None else base
            cells.append(f"{demo.pearson(found, human):.4f} | {float((found * base).sum(-1).mean()):.4f}")
        print(f"| {codes or 'as they are'} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()

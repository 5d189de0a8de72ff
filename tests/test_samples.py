"""Samples: every source, every refusal in one line, and random feeds that a model can take."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from graphopt.core.contract import Context
from graphopt.core.errors import PassError, SampleError
from graphopt.core.pipeline import PassManager
from graphopt.core.pipeline import parse as steps
from graphopt.core.registry import passes
from graphopt.core.replay import Spool
from graphopt.driver.instruments import CheckNumerics
from graphopt.graph import dims as sizes
from graphopt.graph import shapes
from graphopt.run import ort, reference
from graphopt.run import roles as feeds
from graphopt.run.race import sizes_for
from graphopt.run.samples import Samples, random_samples, runnable_samples

HEAD = '<ir_version: 10, opset_import: ["": 23]>\n'


def build(text: str, **weights: np.ndarray[Any, Any]) -> ir.Model:
    model = ir.from_onnx_text(HEAD + text, initializers=[ir.tensor(array, name=name) for name, array in weights.items()])
    shapes.infer_shapes(model)
    return model


def encoder() -> ir.Model:
    """Ids into 10 rows, positions (after + 2) into 32, a mask inverted the classic way, an overridable scale, a rank-0 gain."""
    return build(
        """g (int64[b,s] ids, int64[b,s] pos, int64[b,s] attention, float gain, float[1] scale) => (float[b,s,4] y)
        <float[10,4] table, float[32,4] places, int64 two = {2}, float one = {1}, float big = {-10000}, int64[1] last = {2}, float[1] scale = {1}> {
          e = Gather(table, ids)
          shifted = Add(pos, two)
          p = Gather(places, shifted)
          x = Add(e, p)
          kept = Cast<to=1>(attention)
          dropped = Sub(one, kept)
          fill = Mul(dropped, big)
          wide = Unsqueeze(fill, last)
          masked = Add(x, wide)
          scaled = Mul(masked, scale)
          y = Mul(scaled, gain)
        }""",
        table=np.ones((10, 4), np.float32),
        places=np.ones((32, 4), np.float32),
    )


PAIR = "g (int64[b,s] ids, float[b,4] x) => (float[b,4] y) { y = Relu(x) }"
GOOD = {"ids": np.zeros((2, 3), np.int64), "x": np.zeros((2, 4), np.float32)}


def test_roles_of_inputs() -> None:
    model = encoder()
    found = {str(v.name): feeds.role(v, {"b": 2, "s": 5}) for v in sizes.fed_inputs(model)}
    assert "scale" not in found, "an overridable initializer has its default"
    assert found["ids"] == feeds.Role("index", 0, 9)
    assert found["pos"] == feeds.Role("index", -2, 29), "Gather takes pos + 2"
    assert found["attention"].kind == "mask"
    assert found["gain"].kind == "float"


def test_random_samples_run_and_differ() -> None:
    model = encoder()
    samples = random_samples(model)
    session = ort.session(model, optimize=False)
    for feed in samples:
        session.run(feed)
    for symbol in ("b", "s"):
        axis = 0 if symbol == "b" else 1
        assert len({feed["ids"].shape[axis] for feed in samples}) >= 2
        assert all(feed["ids"].shape[axis] == feed["attention"].shape[axis] for feed in samples)
    assert any(feed["ids"].shape[0] == 1 for feed in samples)
    again = random_samples(model)
    assert all(np.array_equal(a[k], b[k]) for a, b in zip(samples, again, strict=True) for k in a), "the same seed gives the same samples"
    other = random_samples(model, seed=1)
    assert any(not np.array_equal(a["ids"], b["ids"]) for a, b in zip(samples, other, strict=True))


def test_masks_have_a_whole_row_holes_and_left_padding_and_no_empty_row() -> None:
    masks = [feed["attention"] for feed in random_samples(encoder())]
    assert {int(x) for mask in masks for x in mask.flat} == {0, 1}
    rows = [row for mask in masks for row in mask]
    assert any(row.all() for row in masks[0])
    assert all(row.any() for row in rows)
    assert any(row[0] == 0 for row in rows), "left padding"
    holes = [row for row in rows if 0 in row[np.flatnonzero(row)[0] : np.flatnonzero(row)[-1]]]
    assert holes


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("g (bool[b,s] m) => (bool[b,s] y) { y = Not(m) }", "mask"),
        ("g (bool flag) => (bool y) { y = Not(flag) }", "flag"),
        ("g (int64[b,s] m) => (bool[b,s] y) { y = Cast<to=9>(m) }", "mask"),
        ("g (float[b,1,1,s] mask, float[b,2,s,s] scores) => (float[b,2,s,s] y) { y = Add(scores, mask) }", "additive"),
        ("g (int64[b,s] attention_mask) => (int64[b,s] y) { y = Identity(attention_mask) }", "mask"),
        ("g (float[b,s] x) => (float[b,s] y) { y = Neg(x) }", "float"),
        ("g (float[b,s] x) => (float[b,s] y) <float o = {0}> { p = Greater(x, o) n = Neg(x) y = Where(p, x, n) }", "float"),
        ("g (float[b,s] m) => (float[b,s] y) <float o = {1}, float big = {-10000}> { d = Sub(o, m) f = Mul(d, big) y = Add(f, m) }", "mask"),
        ("g (float[b,s] x) => (bool[2] y) <int64 one = {1}> { n = Shape(x) y = Equal(n, one) }", "float"),
        ("g (int64 n, int64 one, int64 zero) => (int64[k] y) { y = Range(zero, n, one) }", "count"),
    ],
)
def test_kind_of_the_first_input(text: str, kind: str) -> None:
    assert feeds.role(build(text).graph.inputs[0], {}).kind == kind


def test_bounds_hold_through_layout_subgraphs_and_arithmetic() -> None:
    model = build(
        """g (int64[b,s] ids, int64[b,s] mixed, bool c) => (float[n] y) <float[7] table, int64 three = {3}, int64 one = {1}, int64[1] flat = {-1}> {
          a = Reshape(ids, flat)
          m = Mul(mixed, three)
          o = Sub(m, one)
          r = Reshape(o, flat)
          z = Gather(table, r)
          q = If(c) <then_branch = t () => (float[n] p) { p = Gather(table, a) }, else_branch = e () => (float[n] n1) { n1 = Gather(table, a) }>
          y = Add(z, q)
        }""",
        table=np.ones(7, np.float32),
    )
    ids, mixed = model.graph.inputs[0], model.graph.inputs[1]
    assert feeds.role(ids, {}) == feeds.Role("index", 0, 6)
    assert feeds.role(mixed, {}) == feeds.Role("index", 1, 2), "0 <= 3 x - 1 <= 6"


def test_an_index_into_an_axis_of_symbolic_size_stays_below_that_size() -> None:
    model = build("g (float[b,s] x, int64[b,k] at) => (float[b,k] y) { y = GatherElements<axis=1>(x, at) }")
    for feed in random_samples(model):
        assert feed["at"].max() < feed["x"].shape[1]
        reference.session(model).run(feed)


def test_expressions_anonymous_dimensions_and_rank_0() -> None:
    model = build("g (float[b,p] past, float[b,s] x, float[b,t] both, float[?,2] loose, float gain) => (float[b,p] y) { y = Relu(past) }")
    model.graph.inputs[2].shape = ir.Shape(["b", "p + s"])
    model.graph.inputs[3].shape = ir.Shape([None, 2])
    assert set(sizes.symbols(model)) == {"b", "p", "s", "loose.0"}
    for feed in random_samples(model):
        assert feed["both"].shape[1] == feed["past"].shape[1] + feed["x"].shape[1]
        assert feed["gain"].shape == ()


def test_sizes_grow_until_no_value_is_empty() -> None:
    model = build(
        "g (float[b,1,n] wave) => (float[b,2,m] y) <float[2,1,40] w> { y = Conv<strides=[20]>(wave, w) }", w=np.ones((2, 1, 40), np.float32)
    )
    samples = random_samples(model)
    assert all(feed["wave"].shape[2] >= 40 for feed in samples)
    assert len({feed["wave"].shape[2] for feed in samples}) >= 2


def test_runnable_samples_find_that_two_symbols_are_one() -> None:
    model = build("g (float[b,s] x, float[b,t] y) => (float[b,u] z) { z = Add(x, y) }")
    samples = runnable_samples(model, ort.session(model, optimize=False))
    assert all(feed["x"].shape == feed["y"].shape for feed in samples)
    impossible = build("g (float[b,3] x) => (float[b,3] y) <int64[1] five = {7}> { y = Reshape(x, five) }")
    with pytest.raises(SampleError, match=r"none of the made-up samples .*--samples"):
        runnable_samples(impossible, ort.session(impossible, optimize=False))


def test_default_shapes_stay_inside_the_position_table() -> None:
    model = build(
        "g (int64[b,s] ids) => (float[1,k,4] y) <float[1,77,4] table, int64[1] zero = {0}, int64[1] one = {1}> "
        "{ n = Shape<start=1>(ids) y = Slice(table, zero, n, one) }",
        table=np.ones((1, 77, 4), np.float32),
    )
    assert sizes_for(model) == {"1x16": {"b": 1, "s": 16}, "1x77": {"b": 1, "s": 77}, "8x64": {"b": 8, "s": 64}}
    assert sizes_for(build("g (float[2] x) => (float[2] y) { y = Relu(x) }")) == {"as declared": {}}


def test_sources(tmp_path: Path) -> None:
    model = build(PAIR)
    np.savez(tmp_path / "a.npz", **GOOD)
    np.savez(tmp_path / "b.npz", **GOOD)
    for source in (tmp_path, str(tmp_path), [GOOD, GOOD], (GOOD for _ in range(2)), [(GOOD["ids"], GOOD["x"])] * 2, Samples([GOOD, GOOD])):
        samples = Samples.load(source, model)
        assert len(samples) == 2
        assert [list(b) for b in samples] == [["ids", "x"], ["ids", "x"]]
        assert [list(b) for b in samples] == [["ids", "x"], ["ids", "x"]], "a second iteration gives the same"
    assert len(Samples.load(GOOD, model)) == 1
    assert len(Samples.load(tmp_path / "a.npz", model)) == 1

    def endless() -> Iterator[dict[str, Any]]:
        while True:
            yield GOOD

    assert len(Samples.load(endless(), model, limit=3)) == 3


def test_a_torch_data_loader() -> None:
    torch = pytest.importorskip("torch")
    data = [{"ids": torch.zeros(3, dtype=torch.long), "x": torch.ones(4)} for _ in range(4)]
    samples = Samples.load(torch.utils.data.DataLoader(data, batch_size=2), build(PAIR))
    assert [b["x"].shape for b in samples] == [(2, 4), (2, 4)]


def test_text_and_tokenizer(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    words = ["[PAD]", "[UNK]", "a", "b", "c", "d"]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: k for k, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "lines.txt").write_text("a b c\n\nd\na b c d a b c d\n", encoding="utf-8")
    model = build("g (int32[b,s] input_ids, int64[b,s] attention_mask) => (int32[b,s] y) { y = Identity(input_ids) }")
    first, second = Samples.load(tmp_path / "lines.txt", model, tokenizer=tmp_path / "tokenizer.json", batch=2, max_length=6)
    assert list(first) == ["input_ids", "attention_mask"], "the model has no token_type_ids"
    assert first["input_ids"].dtype == np.int32
    np.testing.assert_array_equal(first["input_ids"], [[2, 3, 4], [5, 0, 0]])
    np.testing.assert_array_equal(first["attention_mask"], [[1, 1, 1], [1, 0, 0]])
    assert second["input_ids"].shape == (1, 6), "cut to max_length"
    assert len(Samples.load(["a b", "c"], model, tokenizer=tokenizer)) == 1
    assert tokenizer.padding is None, "the caller's tokenizer stays as it was"
    with pytest.raises(SampleError, match="need a tokenizer; add --tokenizer"):
        Samples.load(["a b"], model)


def test_casts_only_where_nothing_is_lost() -> None:
    model = build(PAIR)
    (batch,) = Samples.load({"ids": np.zeros((2, 3), np.int32), "x": np.full((2, 4), 0.5)}, model)
    assert (batch["ids"].dtype, batch["x"].dtype) == (np.int64, np.float32)
    with pytest.raises(SampleError, match="input `x` must be float32; as float32 its float64 values would change"):
        Samples.load({**GOOD, "x": np.full((2, 4), 0.1)}, model)
    small = build("g (int32[b] ids) => (int32[b] y) { y = Neg(ids) }")
    with pytest.raises(SampleError, match="its int64 values would change"):
        Samples.load({"ids": np.array([2**40])}, small)


def spent() -> Iterator[dict[str, Any]]:
    generator = (GOOD for _ in range(1))
    list(generator)
    return generator


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (list, "samples gave 0 batches"),
        (spent, "samples gave 0 batches: the source is empty, or a generator that was used before"),
        (lambda: [GOOD, {"ids": GOOD["ids"]}], "batch 2: input `x` missing; the model needs ids, x"),
        (lambda: {**GOOD, "labels": GOOD["ids"]}, "batch 1: the model has no input `labels`; it needs ids, x"),
        (lambda: {**GOOD, "ids": GOOD["ids"].astype(np.float32)}, "input `ids` must be int64, found float32"),
        (lambda: {**GOOD, "ids": GOOD["ids"] > 0}, "input `ids` must be int64, found bool"),
        (lambda: {**GOOD, "ids": GOOD["ids"][0]}, r"input `ids` must have 2 axes \[b,s\], found 1: \[3\]"),
        (lambda: {**GOOD, "x": np.zeros((2, 5), np.float32)}, r"input `x` must be \[b,4\], found \[2, 5\]"),
        (lambda: {**GOOD, "x": np.zeros((3, 4), np.float32)}, r"input `x` must be \[b,4\] with b = 2, found \[3, 4\]"),
        (lambda: [(GOOD["ids"],)], "a tuple of 1; the model needs 2: ids, x"),
        (lambda: {**GOOD, "ids": [[1, 2], [3]]}, "ragged"),
        (lambda: "no/such/path.npz", "no/such/path.npz does not exist"),
        (lambda: 3, "must be a path or an iterable of batches, found int"),
    ],
)
def test_refusals_are_one_line_that_names_the_input(source: Callable[[], Any], expected: str) -> None:
    with pytest.raises(SampleError, match=expected) as caught:
        Samples.load(source(), build(PAIR))
    assert "\n" not in str(caught.value)


def test_bad_files(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.npz").write_bytes(b"PK no zip")
    (tmp_path / "pickle.npz").write_bytes(b"")
    for name, expected in {"empty": "has no .npz file", "bad.npz": "cannot be read as a .npz", "pickle.npz": "cannot be read as a .npz"}.items():
        with pytest.raises(SampleError, match=expected) as caught:
            Samples.load(tmp_path / name, build(PAIR))
        assert "\n" not in str(caught.value)


def test_what_can_be_read_once_is_not_kept_in_memory_and_comes_again_as_it_was(tmp_path: Path) -> None:
    text = np.array([["a", "b c"], ["", "d"]], object)
    model = build("g (string[b,2] file, float[b,2] x, bfloat16[b] h) => (float[b,2] y) { y = Relu(x) }")
    batches = [{"file": text, "x": np.full((2, 2), k, np.float64), "h": np.array([1.5, k], ml_dtypes.bfloat16)} for k in range(3)]
    samples = Samples.load((b for b in batches), model)
    for _ in range(2):
        for expected, found in zip(batches, samples, strict=True):
            assert [a.dtype for a in found.values()] == [np.dtype(object), np.float32, ml_dtypes.bfloat16]
            assert all(np.array_equal(expected[name], found[name]) for name in expected)
    again = samples.fit(model)
    assert [float(b["x"][0, 0]) for b in again] == [0, 1, 2]


def test_files_are_read_when_their_turn_comes(tmp_path: Path) -> None:
    for k in range(3):
        np.savez(tmp_path / f"{k}.npz", ids=GOOD["ids"].astype(np.int32), x=np.full((2, 4), k, np.float32))
    samples = Samples.load(tmp_path, build(PAIR))
    batches = iter(samples)
    assert next(batches)["ids"].dtype == np.int64
    np.savez(tmp_path / "1.npz", ids=GOOD["ids"], x=np.full((2, 4), 7, np.float32))
    assert float(next(batches)["x"][0, 0]) == 7
    assert len(Samples.load(tmp_path, build(PAIR), limit=2)) == 2
    (tmp_path / "2.npz").write_bytes(b"no zip")
    with pytest.raises(SampleError, match=r"2\.npz cannot be read"):
        next(batches)


def test_a_shuffled_loader_gives_one_order() -> None:
    class Shuffled:
        turn = 0

        def __iter__(self) -> Iterator[dict[str, Any]]:
            self.turn += 1
            return iter([{**GOOD, "x": GOOD["x"] + k * self.turn} for k in range(3)])

    samples = Samples.load(Shuffled(), build(PAIR))
    assert [[float(b["x"].max()) for b in samples] for _ in range(2)] == [[0, 1, 2]] * 2


def test_a_generator_used_twice_says_so() -> None:
    """I05"""
    generator = (GOOD for _ in range(2))
    assert len(Samples.load(generator, build(PAIR))) == 2
    with pytest.raises(SampleError, match="a generator that was used before"):
        Samples.load(generator, build(PAIR))


FFN = "g (float[B,S,8] x) => (float[B,S,8] y) { h = MatMul(x, up) r = Relu(h) y = MatMul(r, down) }"


def test_a_context_reads_a_generator_as_often_as_it_is_asked() -> None:
    """I05: two passes with samples, each of which runs over them more than once, and a check of the numbers."""
    rng = np.random.default_rng(0)
    weights = {"up": rng.standard_normal((8, 32)).astype(np.float32), "down": rng.standard_normal((32, 8)).astype(np.float32)}
    batches = [{"x": rng.standard_normal((2, 5, 8)).astype(np.float32)} for _ in range(3)]
    pruned = []
    for samples in (batches, iter(batches), (dict(b) for b in batches)):
        model = build(FFN, **weights)
        ctx = Context(model, samples=samples)
        pipeline = steps("prune-ffn{ratio=0.25 multiple=1}, prune-ffn{ratio=0.25 multiple=1 importance=reconstruction}", passes())
        PassManager(pipeline, [CheckNumerics()]).run(model, ctx)
        assert [list(b) for b in ctx.require_samples()] == [["x"]] * 3
        pruned.append([model.graph.initializers[name].const_value.numpy() for name in ("up", "down")])  # type: ignore[union-attr]
    assert pruned[0][0].shape == (8, 18)
    for other in pruned[1:]:
        for a, b in zip(pruned[0], other, strict=True):
            np.testing.assert_array_equal(a, b)


def test_no_samples_at_all_are_missed_in_one_line() -> None:
    model = build(FFN, up=np.ones((8, 32), np.float32), down=np.ones((32, 8), np.float32))
    for nothing in ([], iter(())):
        with pytest.raises(PassError, match="prune-ffn needs samples of the model's inputs, found 0 batches") as caught:
            PassManager(steps("prune-ffn{ratio=0.25}", passes())).run(model, Context(model, samples=nothing))
        assert isinstance(caught.value.cause, SampleError)
    with pytest.raises(PassError, match="prune-ffn needs samples"):
        PassManager(steps("prune-ffn{ratio=0.25 multiple=1 importance=magnitude}", passes())).run(model, Context(model))
    assert model.graph.initializers["up"].shape == (8, 32), "it says so before it cuts"


def test_text_comes_back_from_the_spool_as_it_was() -> None:
    text = np.array(["a", "b\0", b"caf\xc3\xa9", None], object)
    spool = Spool(iter([{"text": text, "ids": np.arange(3)}]))
    assert spool[0]["text"].tolist() == text.tolist()
    assert spool[0]["ids"].tolist() == [0, 1, 2]

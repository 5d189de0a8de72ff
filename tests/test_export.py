"""From torch and from Hugging Face folders: the numbers, dynamic sizes, names, the caller's module, and errors."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import Array, assert_same, minilm_folder, run, text_feeds, to_proto  # type: ignore[import-not-found]

from graphopt.core.errors import LoadError
from graphopt.core.remarks import Remarks
from graphopt.io.load import load

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")


class Toy(torch.nn.Module):  # type: ignore[misc, name-defined]
    """Ids and mask in; a tensor, and a dict, out."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.linear, self.dropout = torch.nn.Embedding(50, 8), torch.nn.Linear(8, 8), torch.nn.Dropout(0.5)
        self.norm = torch.nn.BatchNorm1d(8)

    def forward(self, ids: Any, mask: Any) -> Any:
        x = self.linear(self.table(ids)) * mask[..., None]
        x = self.norm(x.transpose(1, 2)).transpose(1, 2)
        heads = x.reshape(*ids.shape, 2, 4).transpose(1, 2)
        return self.dropout(heads), {"pooled": x.mean(1), "rows": [x.sum(-1)]}


def example(batch: int = 2, length: int = 7) -> tuple[Any, Any]:
    return torch.arange(batch * length).reshape(batch, length) % 50, torch.ones(batch, length)


def shapes(values: Any) -> dict[str, str]:
    return {str(v.name): str(v.shape) for v in values}


OUTPUTS = {"output_0": "[batch,2,sequence,4]", "output_1_pooled": "[batch,8]", "output_1_rows_0": "[batch,sequence]"}


def test_module_is_exported_in_evaluation_mode_and_left_as_it_was() -> None:
    """J07, B09."""
    torch.manual_seed(0)
    module = Toy().train()
    module.norm.eval()
    flags = [m.training for m in module.modules()]
    state = {k: v.clone() for k, v in module.state_dict().items()}
    random = torch.random.get_rng_state()
    remarks = Remarks()
    model = load(module, example_inputs=example(), remarks=remarks)
    assert [m.training for m in module.modules()] == flags
    assert all(torch.equal(v, state[k]) for k, v in module.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), random)
    assert not list(remarks)
    assert shapes(model.graph.inputs) == {"ids": "[batch,sequence]", "mask": "[batch,sequence]"}
    assert shapes(model.graph.outputs) == OUTPUTS
    module.eval()
    for size in ((1, 1), (3, 9)):
        ids, mask = example(*size)
        heads, rest = module(ids, mask)
        expected = {"output_0": heads, "output_1_pooled": rest["pooled"], "output_1_rows_0": rest["rows"][0]}
        found = run(to_proto(model), {"ids": ids.numpy(), "mask": mask.numpy()})
        assert_same({k: v.detach().numpy() for k, v in expected.items()}, found)


def test_a_batch_of_one_in_the_example_stays_dynamic() -> None:
    model = load(Toy(), example_inputs=example(1, 7))
    assert shapes(model.graph.inputs) == {"ids": "[batch,sequence]", "mask": "[batch,sequence]"}


def test_an_axis_that_the_module_fixes_is_a_warning() -> None:
    class Fixed(torch.nn.Module):  # type: ignore[misc, name-defined]
        def forward(self, ids: Any) -> Any:
            return ids.reshape(-1, 7).sum(1) + ids.shape[1] if ids.shape[1] == 7 else ids

    remarks = Remarks()
    load(Fixed(), example_inputs=torch.ones(2, 7, dtype=torch.int64), remarks=remarks)
    (remark,) = remarks
    assert (remark.kind, remark.node) == ("warning", "ids")
    assert "fixes axis 1 (= 7)" in remark.message


def test_sizes_share_a_name_only_if_they_are_equal() -> None:
    class Two(torch.nn.Module):  # type: ignore[misc, name-defined]
        def forward(self, a: Any, b: Any) -> Any:
            return a.float().mean() + b.float().mean()

    model = load(Two(), example_kwargs={"a": torch.ones(2, 5, dtype=torch.int64), "b": torch.ones(2, 5, dtype=torch.int64)})
    assert shapes(model.graph.inputs) == {"a": "[batch,sequence]", "b": "[b_batch,b_sequence]"}


def test_given_dynamic_shapes_are_used() -> None:
    dims = {0: torch.export.Dim("rows")}
    model = load(Toy(), example_inputs=example(), dynamic_shapes=(dims, dims))
    assert shapes(model.graph.inputs) == {"ids": "[rows,7]", "mask": "[rows,7]"}


def test_exported_program() -> None:
    module = Toy().eval()
    auto = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    model = load(torch.export.export(module, example(), dynamic_shapes=(auto, auto)))
    assert shapes(model.graph.inputs) == {"ids": "[batch,sequence]", "mask": "[batch,sequence]"}
    assert shapes(model.graph.outputs) == OUTPUTS


def test_weights_are_shared_with_the_module() -> None:
    module = Toy().eval()
    stored = load(module, example_inputs=example()).graph.initializers["table.weight"].const_value
    assert stored is not None
    assert np.shares_memory(stored.numpy(), module.table.weight.detach().numpy())


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (None, "needs example inputs"),
        ((1,), "do not fit forward"),
        ((torch.zeros(2, 3), torch.ones(2, 3)), r"torch\.export cannot export Toy"),
    ],
)
def test_wrong_example_inputs(inputs: Any, message: str) -> None:
    with pytest.raises(LoadError, match=message) as caught:
        load(Toy(), example_inputs=inputs)
    assert "\n" not in str(caught.value)


def test_missing_torch_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(LoadError, match=r"pip install 'graphopt\[torch\]'"):
        load(Toy(), example_inputs=example())


# ---- Hugging Face folders -----------------------------------------------------------------------------------------------------------------


def tiny(kind: str, folder: Path) -> Any:
    """A small random model, saved; its folder has no tokenizer."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    token = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if kind == "gpt2":
        config = transformers.GPT2Config(vocab_size=100, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)
        model = transformers.GPT2LMHeadModel(config)
    elif kind == "llama":
        config = transformers.LlamaConfig(
            vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64,
            max_position_embeddings=64, tie_word_embeddings=True, **token,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config)
    else:
        config = transformers.BertConfig(
            vocab_size=100, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, max_position_embeddings=64
        )
        model = transformers.BertModel(config)
    model.eval().save_pretrained(folder)
    return model


def seen(arrays: Mapping[str, Any], mask: Any, start: int = 0) -> dict[str, Array]:
    """Arrays without what they hold at padded tokens: a row that attends to nothing is not defined, and the exporter gives it other numbers."""
    out = {}
    for name, array in arrays.items():
        array = np.asarray(array)
        keep = mask.numpy()[:, :, None] if array.ndim == 3 else mask.numpy()[:, None, :, None]
        out[name] = array * keep[:, start:] if array.ndim == 3 else array * keep
    return out


def masked(batch: int, length: int) -> tuple[Any, Any]:
    ids = torch.randint(3, 99, (batch, length), generator=torch.Generator().manual_seed(length))
    mask = torch.ones_like(ids)
    if batch > 1:
        mask[1, : length // 2] = 0
    return ids, mask


def test_minilm_folder(tmp_path: Path) -> None:
    """The class that config.json names, the tokenizer's inputs, dynamic batch and sequence, and torch's numbers."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    folder = minilm_folder()
    remarks = Remarks()
    model = load(folder, remarks=remarks)
    assert not list(remarks)
    assert shapes(model.graph.inputs) == dict.fromkeys(("input_ids", "attention_mask", "token_type_ids"), "[batch,sequence]")
    assert shapes(model.graph.outputs) == {"last_hidden_state": "[batch,sequence,384]", "pooler_output": "[batch,384]"}
    encoder = transformers.AutoModel.from_pretrained(folder, local_files_only=True).eval()
    for size in ((3, 9), (1, 16)):
        feeds = text_feeds(["input_ids", "attention_mask", "token_type_ids"], *size)
        with torch.no_grad():
            expected = encoder(**{k: torch.tensor(v) for k, v in feeds.items()})
        assert_same({k: expected[k].numpy() for k in ("last_hidden_state", "pooler_output")}, run(to_proto(model), feeds))


def test_decoder_without_cache(tmp_path: Path) -> None:
    reference = tiny("llama", tmp_path)
    model = load(tmp_path)
    assert shapes(model.graph.inputs) == dict.fromkeys(("input_ids", "attention_mask"), "[batch,sequence]")
    assert shapes(model.graph.outputs) == {"logits": "[batch,sequence,100]"}
    for size in ((2, 10), (1, 4)):
        ids, mask = masked(*size)
        with torch.no_grad():
            expected = {"logits": reference(input_ids=ids, attention_mask=mask).logits}
        found = run(to_proto(model), {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
        assert_same(seen(expected, mask), seen(found, mask))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_decoder_with_past(kind: str, tmp_path: Path) -> None:
    """With no past and with some, the numbers are torch's, and the present of one call is the past of the next."""
    reference = tiny(kind, tmp_path)
    model = load(tmp_path, with_past=True)
    heads = {"llama": 2, "gpt2": 4}[kind]
    parts = [f"{layer}.{part}" for layer in (0, 1) for part in ("key", "value")]
    assert shapes(model.graph.inputs) == {
        "input_ids": "[batch,sequence]",
        "attention_mask": "[batch,past_sequence + sequence]",
        **{f"past_key_values.{p}": f"[batch,{heads},past_sequence,8]" for p in parts},
    }
    assert [v.name for v in model.graph.outputs] == ["logits", *(f"present.{p}" for p in parts)]
    proto = to_proto(model)
    ids, mask = masked(2, 11)
    past: dict[str, Array] = {f"past_key_values.{p}": np.zeros((2, heads, 0, 8), np.float32) for p in parts}
    cache = None
    for start, stop in ((0, 6), (6, 7), (7, 11)):
        with torch.no_grad():
            out = reference(input_ids=ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        found = run(proto, {"input_ids": ids[:, start:stop].numpy(), "attention_mask": mask[:, :stop].numpy(), **past})
        expected = {"logits": out.logits}
        for layer in (0, 1):
            expected |= {f"present.{layer}.key": cache.layers[layer].keys, f"present.{layer}.value": cache.layers[layer].values}
        assert_same(seen(expected, mask[:, :stop], start), seen(found, mask[:, :stop], start))
        past = {f"past_key_values.{p}": found[f"present.{p}"] for p in parts}


def test_task_overrides_the_class_and_random_weights_are_named(tmp_path: Path) -> None:
    tiny("bert", tmp_path)
    remarks = Remarks()
    model = load(tmp_path, task="text-classification", remarks=remarks)
    assert shapes(model.graph.outputs) == {"logits": "[batch,2]"}
    (remark,) = remarks
    assert remark.kind == "warning"
    assert "2 weights of BertForSequenceClassification are not in the folder and are random" in remark.message


def test_bad_folders(tmp_path: Path) -> None:
    tiny("bert", tmp_path)
    broken = tmp_path / "broken"
    broken.mkdir()
    shutil.copy(tmp_path / "config.json", broken)
    config = json.loads((tmp_path / "config.json").read_text())
    cases: list[tuple[Path, dict[str, Any], str]] = [
        (tmp_path, {"task": "text-clasification"}, "no task `text-clasification`; did you mean `text-classification`"),
        (tmp_path, {"with_past": True}, "keeps no key/value cache"),
        (broken, {}, "transformers cannot load the model"),
    ]
    for folder, options, message in cases:
        with pytest.raises(LoadError, match=message) as caught:
            load(folder, **options)
        assert "\n" not in str(caught.value)
        assert str(folder) in str(caught.value)
    (broken / "config.json").write_text(json.dumps(config | {"architectures": ["NopeModel"]}))
    with pytest.raises(LoadError, match="names the class NopeModel"):
        load(broken)
    (broken / "config.json").write_text("{")
    with pytest.raises(LoadError, match="expected JSON"):
        load(broken)
    (broken / "config.json").rename(broken / "x.onnx")
    with pytest.raises(LoadError, match=r"give the file .*x\.onnx"):
        load(broken)


def test_missing_transformers_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(LoadError, match=r"pip install 'graphopt\[hf\]'"):
        load(tmp_path)

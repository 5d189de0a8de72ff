"""Hugging Face model folders: the class that the config names, its inputs, and an export with dynamic batch and sequence."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import onnx_ir as ir

from graphopt.core.errors import LoadError, about, require
from graphopt.core.options import near
from graphopt.core.remarks import Remarks
from graphopt.io.formats.format import Format, Loaded, is_path
from graphopt.io.formats.torch_module import export_module, first_line, quiet, require_torch

_TASKS = {
    "feature-extraction": "AutoModel",
    "fill-mask": "AutoModelForMaskedLM",
    "text-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "multiple-choice": "AutoModelForMultipleChoice",
    "text-generation": "AutoModelForCausalLM",
    "text2text-generation": "AutoModelForSeq2SeqLM",
    "image-classification": "AutoModelForImageClassification",
    "audio-classification": "AutoModelForAudioClassification",
    "automatic-speech-recognition": "AutoModelForCTC",
}
_BATCH, _SEQUENCE, _DECODER_SEQUENCE, _PAST, _SAMPLES = 2, 8, 5, 3, 3200  # sizes of the example: none is 1, and no two are equal
_LENGTHS = {
    "input_ids": "sequence",
    "attention_mask": "sequence",
    "token_type_ids": "sequence",
    "decoder_input_ids": "decoder_sequence",
    "input_values": "samples",
}


class HuggingFaceFolder(Format):
    given: ClassVar[str] = "a path"
    own: ClassVar[tuple[str, ...]] = ("task", "with_past")
    owned: ClassVar[str] = "task and with_past are for Hugging Face folders"

    def recognizes(self, source: Any) -> bool:
        return is_path(source) and os.path.isdir(source)

    def read(self, source: Any, options: Mapping[str, Any], remarks: Remarks) -> Loaded:
        folder = Path(source)
        model = export_folder(folder, options.get("task"), options.get("with_past", False), remarks)
        return model, str(source), [str(p.absolute()) for p in folder.rglob("*") if p.is_file()]


def export_folder(folder: Path, task: str | None, with_past: bool, remarks: Remarks) -> ir.Model:
    """Export the model of a folder with config.json and weights, in float32, without a key/value cache unless `with_past`. Works offline.

    Raises:
        LoadError: no model folder, unknown task, no transformers, or a model that cannot be exported so.
    """
    config = _read_config(folder)
    if task is not None and task not in _TASKS:
        raise LoadError(f"{folder}: there is no task `{task}`{near(task, _TASKS)}; tasks: {', '.join(_TASKS)}")
    torch, transformers = require_torch(), require("Hugging Face folders", "hf", "transformers")
    with about(str(folder)), quiet(), _no_progress(transformers):
        model = _load(transformers, torch, folder, config, task, remarks)
        if hasattr(model, "set_experts_implementation"):
            model.set_experts_implementation("batched_mm")  # the default, grouped_mm, has no form in ONNX; the numbers are the same
        for config_of in {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values():
            config_of.use_cache = False  # encoder and decoder may have configs of their own
        inputs, lengths = _example(torch, model, folder)
        batches = {"pixel_values": "images"} if "input_ids" in inputs else {}  # so many texts, and another number of images
        names = {name: {0: batches.get(name, "batch")} | ({1: lengths[name]} if name in lengths else {}) for name in inputs}
        if with_past:
            return _export_with_past(torch, transformers, model, inputs, remarks)
        axes = {name: dict.fromkeys(named, torch.export.Dim.AUTO) for name, named in names.items()}
        return export_module(model, None, inputs, axes, remarks, names)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        found = sorted(p.name for p in folder.glob("*.onnx"))
        hint = f"give the file {folder / found[0]}" if found else "give an .onnx file, or a folder with config.json and weights"
        raise LoadError(f"{folder}: expected a Hugging Face model folder, found a folder without config.json; {hint}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise LoadError(f"{path}: expected JSON, found something else ({error}); download the model again") from None
    if not isinstance(config, dict):
        raise LoadError(f"{path}: expected a JSON object, found {type(config).__name__}; download the model again")
    return config


@contextlib.contextmanager
def _no_progress(transformers: Any) -> Iterator[None]:
    logs = transformers.utils.logging
    enabled = logs.is_progress_bar_enabled()
    try:
        logs.disable_progress_bar()
        yield
    finally:
        if enabled:
            logs.enable_progress_bar()


def _load(transformers: Any, torch: Any, folder: Path, config: Mapping[str, Any], task: str | None, remarks: Remarks) -> Any:
    named = (config.get("architectures") or [None])[0]
    cls = getattr(transformers, _TASKS[task] if task is not None else named or "AutoModel", None)
    if cls is None:
        raise LoadError(f"config.json names the class {named}, which transformers {transformers.__version__} lacks; give a task")
    try:
        model, info = cls.from_pretrained(folder, local_files_only=True, dtype=torch.float32, output_loading_info=True)
    except Exception as error:
        raise LoadError(f"transformers cannot load the model: {first_line(error)}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        remarks.warning(missing[0], f"{len(missing)} weights of {type(model).__name__} are not in the folder and are random", names=missing)
    stored = config.get("dtype") or config.get("torch_dtype") or "float32"
    if stored != "float32":
        remarks.warning("", f"the weights are stored as {stored} and exported as float32")
    return model.eval()


# ---- inputs ---------------------------------------------------------------------------------------------------------------------------


def _example(torch: Any, model: Any, folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Example inputs that the model's forward takes, and the names of their second axes where these are dynamic."""
    import inspect

    config, accepted = model.config, set(inspect.signature(model.forward).parameters)
    main = model.main_input_name
    wanted = {main}
    if {"text_config", "vision_config"} <= set(config.to_dict()) and (main != "input_ids" or hasattr(model, "logit_scale")):
        wanted |= {"input_ids", "pixel_values"}  # the scale of a similarity: texts and images are compared, and neither can be left out
    if "input_ids" in wanted:
        wanted.add("attention_mask")
        if "token_type_ids" in _tokenizer_inputs(folder):
            wanted.add("token_type_ids")
    if config.is_encoder_decoder:
        wanted.add("decoder_input_ids")
    order = ("input_ids", "attention_mask", "token_type_ids", "pixel_values", "input_features", "input_values", "decoder_input_ids")
    unknown = wanted - set(order)
    if unknown:
        raise LoadError(f"{type(model).__name__} is fed {', '.join(sorted(unknown))}, of which no example can be made; load the module itself")
    inputs = {name: _make(torch, name, config) for name in order if name in wanted & accepted}
    return inputs, {name: length for name, length in _LENGTHS.items() if name in inputs}


def _make(torch: Any, name: str, config: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    text = config.get_text_config()
    if name in ("input_ids", "decoder_input_ids"):
        length = _SEQUENCE if name == "input_ids" else _DECODER_SEQUENCE
        return torch.randint(text.vocab_size // 2, text.vocab_size, (_BATCH, length), generator=generator)
    if name == "attention_mask":
        return torch.ones(_BATCH, _SEQUENCE, dtype=torch.int64)
    if name == "token_type_ids":
        return torch.zeros(_BATCH, _SEQUENCE, dtype=torch.int64)
    if name == "input_values":
        return torch.randn(_BATCH, _SAMPLES, generator=generator)
    if name == "input_features":
        return torch.randn(_BATCH, config.num_mel_bins, 2 * config.max_source_positions, generator=generator)
    vision = getattr(config, "vision_config", config)
    size = vision.image_size
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return torch.randn(_BATCH, getattr(vision, "num_channels", 3), height, width, generator=generator)


def _tokenizer_inputs(folder: Path) -> list[str]:
    """The inputs that the folder's tokenizer makes; none if the folder has no tokenizer."""
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json")):
        return []
    try:
        return list(AutoTokenizer.from_pretrained(folder, local_files_only=True).model_input_names)
    except Exception as error:
        raise LoadError(f"transformers cannot load the tokenizer: {first_line(error)}") from error


# ---- with a key/value cache -----------------------------------------------------------------------------------------------------------


def _export_with_past(torch: Any, transformers: Any, model: Any, inputs: Mapping[str, Any], remarks: Remarks) -> ir.Model:
    """Inputs input_ids [batch, sequence], attention_mask [batch, past_sequence + sequence] and past_key_values.N.key/value
    [batch, kv_heads, past_sequence, head_dim]; outputs logits (or last_hidden_state) and present.N.key/value."""
    if set(inputs) != {"input_ids", "attention_mask"} or model.config.is_encoder_decoder:
        raise LoadError(f"{type(model).__name__} is no decoder that is fed token ids alone; leave out with_past")
    past = _probe_cache(torch, model, inputs)
    wrapper = _wrapper(torch, transformers, model)
    mask = torch.ones(_BATCH, _PAST + _SEQUENCE, dtype=torch.int64)
    auto = torch.export.Dim.AUTO
    axes = {"input_ids": {0: auto, 1: auto}, "attention_mask": {0: auto, 1: auto}, "past": [({0: auto, 2: auto}, {0: auto, 2: auto}) for _ in past]}
    names = {"input_ids": {0: "batch", 1: "sequence"}, "attention_mask": {0: "batch", 1: "past_sequence + sequence"}}
    for layer in range(len(past)):
        names |= {f"past_{layer}_{part}": {0: "batch", 2: "past_sequence"} for part in (0, 1)}
    exported = export_module(wrapper, None, {"input_ids": inputs["input_ids"], "attention_mask": mask, "past": past}, axes, remarks, names)
    parts = [f"{layer}.{part}" for layer in range(len(past)) for part in ("key", "value")]
    for value, part in zip(exported.graph.inputs[2:], parts, strict=True):
        value.name = f"past_key_values.{part}"
    for value, part in zip(exported.graph.outputs[1:], parts, strict=True):
        value.name = f"present.{part}"
    return exported


def _probe_cache(torch: Any, model: Any, inputs: Mapping[str, Any]) -> list[tuple[Any, Any]]:
    """Keys and values of the right shapes for an example of `_PAST` earlier tokens."""
    first = {name: tensor[:, :_PAST] for name, tensor in inputs.items()}
    try:
        with torch.no_grad():
            layers = getattr(getattr(model(**first, use_cache=True), "past_key_values", None), "layers", [])
    except Exception as error:
        raise LoadError(f"{type(model).__name__} does not run with a key/value cache: {first_line(error)}; leave out with_past") from error
    pairs = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in layers]
    if not pairs or any(k is None or v is None or k.dim() != 4 or k.shape[2] != _PAST for k, v in pairs):
        raise LoadError(f"{type(model).__name__} keeps no key/value cache of [batch, heads, sequence, head_dim]; leave out with_past")
    return [(k, v) for k, v in pairs if k is not None and v is not None]


def _wrapper(torch: Any, transformers: Any, model: Any) -> Any:
    class WithPast(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any, attention_mask: Any, past: list[tuple[Any, Any]]) -> dict[str, Any]:
            cache = transformers.DynamicCache(past)
            out = self.model(input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=True)
            first = next(name for name in ("logits", "last_hidden_state") if name in out)
            present = {f"present_{k}": (layer.keys, layer.values) for k, layer in enumerate(out.past_key_values.layers)}
            return {first: out[first], **present}

    return WithPast()

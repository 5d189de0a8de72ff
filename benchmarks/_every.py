"""Every architecture that transformers knows: a small model of it, by the names of its configuration and of its inputs alone."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import inspect
import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Any

import _count
import _feeds
from _feeds import Case
from _shrink import FIRST_SPECIAL, IMAGES, VOCABULARY, WIDTH, small
from _special import INPUTS, LENGTHS, OVERRIDES
from _worker import reason

MOST_PARAMETERS, MOST_PLANS = 40_000_000, 24
_CLASSES = (  # where to look for the class of a model, first to last
    "MODEL", "MODEL_FOR_CAUSAL_LM", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM", "MODEL_FOR_IMAGE_TEXT_TO_TEXT", "MODEL_FOR_BACKBONE",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ", "MODEL_FOR_MULTIMODAL_LM", "MODEL_FOR_PRETRAINING", "MODEL_FOR_OBJECT_DETECTION",
    "MODEL_FOR_DEPTH_ESTIMATION", "MODEL_FOR_IMAGE_CLASSIFICATION",
)  # fmt: skip
_LEFT_OUT = ("past_key_values", "encoder_past", "hidden_states", "attentions", "cache", "loss", "rope_deltas", "router", "mems")


def names() -> list[str]:
    """Every model type, in the order of the alphabet."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return sorted(CONFIG_MAPPING_NAMES)


class NoModel(Exception):
    """Why there is no small model of a type."""


class Part(NoModel):
    """It is no model of its own."""


def config_class(name: str) -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return CONFIG_MAPPING[name]


def model_class(name: str) -> Any:
    """The model of a type: of the library's own tables, or the first class of its module that has this configuration.

    Raises:
        Part: there is none.
    """
    import transformers
    from transformers.models.auto import modeling_auto

    for table in _CLASSES:
        found = getattr(modeling_auto, f"{table}_MAPPING_NAMES").get(name)
        if found is not None:
            return getattr(transformers, found if isinstance(found, str) else found[0])
    config = config_class(name)
    module = importlib.import_module(config.__module__.replace(".configuration_", ".modeling_"))
    own = [
        c for c in vars(module).values()
        if inspect.isclass(c) and issubclass(c, transformers.PreTrainedModel) and c.__module__ == module.__name__
        and c.config_class is config and "forward" in vars(c) and not c.__name__.endswith("PreTrainedModel")
    ]  # fmt: skip
    if not own:
        raise Part("no class of a model has this configuration alone: it is a part of another")
    return next((c for c in own if c.__name__.endswith("Model")), own[0])


@dataclasses.dataclass(frozen=True)
class Input:
    """One input of a forward call: the parameter's name, and how its tensor is made (a key of _MAKERS)."""

    name: str
    kind: str


Plan = tuple[Input, ...]


class Sizes:
    """Sizes that the makers of inputs need, looked up in a configuration and the configurations inside."""

    def __init__(self, config: Any) -> None:
        self.config = config

    def __call__(self, names: str, default: int) -> int:
        """The first of some fields that is a positive number."""
        for name in names.split():
            for value in self._all(self.config, name):
                value = value[0] if isinstance(value, (list, tuple)) and value else value
                if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                    return value
        return default

    def _all(self, config: Any, name: str) -> Iterator[Any]:
        own = getattr(config, name, None)
        if own is not None:
            yield own
        for inner in vars(config).values():
            if hasattr(inner, "sub_configs"):
                yield from self._all(inner, name)


class Model:
    """A small model of a type. As zoo.Model: a torch module that takes the inputs in order and gives a tuple of arrays, and its feeds.

    Raises:
        NoModel: no size and no choice of inputs gives a model whose forward pass runs; the reason of the last.
    """

    kind = "every"

    def __init__(self, name: str, implementation: str) -> None:
        self.name, self.row = name, self
        first: Exception | None = None
        for image in IMAGES:
            if first is not None and "pixel_values" not in getattr(self, "parameters", ("pixel_values",)):
                break  # it has no image whose size matters
            try:
                self._build(image, implementation)
                self._choose()
                break
            except (ImportError, Part) as error:
                raise NoModel(reason(error)) from error
            except Exception as error:  # noqa: BLE001  whatever a size breaks: the next may do
                first = first or error
        if not hasattr(self, "blocks"):
            raise NoModel(reason(first or AssertionError())) from first
        from zoo import wrapped

        self.module = wrapped(self)
        self.facts = {
            "family": self._family(), "class": type(self.inner).__name__, "inputs": {i.name: i.kind for i in self.plan},
            "parameters": sum(p.numel() for p in self.inner.parameters()),
        }  # fmt: skip

    def _family(self) -> str:
        kinds = {i.kind for i in self.plan}
        text, visual, decoder = bool(kinds & {"ids", "mask", "boxes"}), bool(kinds & _VISUAL), "decoder ids" in kinds
        sound = bool(kinds & _SOUND)
        if text + visual + sound > 1:
            return "multimodal"
        return "encoder-decoder" if decoder else "vision" if visual else "audio" if sound else "text" if text else "other"

    def _build(self, image: int, implementation: str) -> None:
        import torch

        config = small(config_class(self.name), image, OVERRIDES.get(self.name, {}))
        _no_cache(config)
        kind = model_class(self.name)
        with torch.device("meta"):
            parameters = sum(p.numel() for p in _made(kind, config, implementation)[0].parameters())
        if parameters > MOST_PARAMETERS:
            raise NoModel(f"{parameters / 1e6:.0f} million parameters, and smaller it does not run")
        torch.manual_seed(0)
        self.inner, self.implementation = _made(kind, config, implementation)
        from zoo import spread

        spread(self.inner)
        self.sizes, self.image = Sizes(config), image
        self.parameters = list(inspect.signature(self.inner.forward).parameters)

    def _choose(self) -> None:
        """The first plan whose forward pass runs, gives numbers, and gives them again."""
        import torch

        problem: Exception | None = None
        for plan in itertools.islice(plans(self.name, self.inner), MOST_PLANS):
            self.plan, self.tokens = plan, 0
            try:
                example = self.feeds()[0][1]
                example, out = self._first_numbers(example)
                if any(not torch.isfinite(t).any() for t in out if t.is_floating_point() and t.numel()):
                    raise NoModel("its numbers are not finite")
                torch.manual_seed(5)
                if _count.apart(out, self._numbers(example)) > 1e-5:
                    raise NoModel("two runs give different numbers")
                self.blocks, _ = _count.blocks(functools.partial(self.call, example))
                return
            except Exception as error:  # noqa: BLE001  whatever an input breaks: the next plan may do
                problem = problem or error  # that of the fullest plan
        raise problem or NoModel(f"no inputs are known for {', '.join(self.parameters)}")

    def _first_numbers(self, example: Mapping[str, Any]) -> tuple[Mapping[str, Any], Any]:
        """The first run. A text has to hold as many tokens as the image has features (the model counts vectors, or numbers)."""
        try:
            return example, self._numbers(example)
        except (ValueError, RuntimeError) as error:
            features = _features(error) // len(next(iter(example.values())))
            for tokens in filter(None, (features, features // self.sizes("hidden_size", WIDTH))):
                self.tokens = tokens
                with contextlib.suppress(ValueError, RuntimeError):
                    example = self.feeds()[0][1]
                    return example, self._numbers(example)
            raise

    def _numbers(self, feed: Mapping[str, Any]) -> Any:
        import torch

        with torch.no_grad():
            return self.call(feed)

    def feeds(self) -> list[tuple[str, dict[str, Any]]]:
        """Named feeds; the first is the example for the exporter."""
        return [(str(c), self._feed(c, seed)) for seed, c in enumerate(self.cases())]

    def cases(self) -> tuple[Case, ...]:
        long, short = LENGTHS.get(self.name, (12, 7))
        kinds = {i.kind for i in self.plan}
        if "mask" in kinds:
            return (Case(2, long, "right"), Case(1, short), Case(2, long, "left"), Case(3, short, "holes"), Case(2, short, "empty"))
        return (Case(2, long), Case(1, short), Case(3, long)) if kinds & _LONG else (Case(2, long), Case(1, long), Case(3, long))

    def _feed(self, case: Case, seed: int) -> dict[str, Any]:
        import torch

        torch.manual_seed(seed)
        return {i.name: _MAKERS[i.kind](case, self) for i in self.plan}

    def axes(self, name: str) -> dict[int, str]:
        """The axes of an input that differ between its feeds; equal names are equal sizes."""
        feeds, cases = [feed[name] for _, feed in self.feeds()], self.cases()
        kind = next(i.kind for i in self.plan if i.name == name)
        varied = [k for k in range(feeds[0].ndim) if len({t.shape[k] for t in feeds}) > 1]
        batch = all(len(t) == c.batch for t, c in zip(feeds, cases, strict=True))
        return {k: "batch" if k == 0 and batch else _AXES.get(kind, f"{name}_{k}") if k else f"{name}_0" for k in varied}

    def call(self, feed: Mapping[str, Any]) -> tuple[Any, ...]:
        """What the model computes: every tensor of floating point that it gives, but for caches and inner states."""
        import torch
        from torch.utils._pytree import tree_leaves

        more = {k: v for k, v in {"use_cache": False, "return_dict": True}.items() if k in self.parameters}
        out = self.inner(**feed, **more)
        parts = {k: v for k, v in out.items() if not any(w in k for w in _LEFT_OUT)} if hasattr(out, "items") else {"out": out}
        found = [t for v in parts.values() for t in _tensors(v, tree_leaves) if isinstance(t, torch.Tensor) and t.is_floating_point()]
        distinct = {id(t): t for t in found if t.numel()}
        return tuple(itertools.islice(distinct.values(), 6))


def _tensors(value: Any, leaves: Any) -> list[Any]:
    if hasattr(value, "items"):
        return [t for k, v in value.items() if not any(w in k for w in _LEFT_OUT) for t in _tensors(v, leaves)]
    return list(leaves(value))


def _made(kind: Any, config: Any, implementation: str) -> tuple[Any, str]:
    for wanted in dict.fromkeys((implementation, "eager")):
        try:
            return kind._from_config(config, attn_implementation=wanted).eval(), wanted
        except (ValueError, ImportError):
            if wanted == "eager":
                raise
    raise AssertionError


def _no_cache(config: Any) -> None:
    for name, value in vars(config).items():
        if hasattr(value, "sub_configs"):
            _no_cache(value)
        if name == "use_cache":
            config.use_cache = False
    config._experts_implementation = "batched_mm"  # the default kernel has no ONNX spelling


def _features(error: BaseException) -> int:
    """How many features of an image there are for the tokens of a text, from what the model says is missing."""
    found = re.search(r"do not match.*?tokens:?\s*\d+.*?features:?\s*(?:torch\.Size\(\[)?(\d+)", str(error), re.DOTALL)
    return int(found[1]) if found else 0


# ---- inputs ---------------------------------------------------------------------------------------------------------------------------


def plans(name: str, model: Any) -> Iterator[Plan]:
    """Inputs to try, from all that a model can read to the text, image or sound alone."""
    if name in INPUTS:
        yield tuple(Input(n, k) for n, k in INPUTS[name])
        return
    signature = inspect.signature(model.forward).parameters
    required = [n for n, p in signature.items() if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    text = [n for n in ("input_ids", "bbox", "attention_mask") if n in signature]
    decoder = [n for n in ("decoder_input_ids",) if n in signature]
    visual = [
        n for n in ("pixel_values", "flattened_patches", "pixel_values_videos", "hidden_states", "image_grid_thw", "grid_thw") if n in signature
    ]
    visual = visual[:1]
    sound = [n for n in ("input_features", "input_values", "audio_values", "padding_mask") if n in signature][:1]
    if "input_ids" not in signature:
        text = []
    groups: list[list[str]] = []
    together = ((text, visual, sound, decoder), (text, visual, decoder), (text, sound, decoder), (text, decoder), (visual, decoder), (sound, decoder))
    for parts in (*together, (text,), (visual,), (sound,)):
        wanted = list(dict.fromkeys(n for part in parts for n in part))
        wanted += [n for n in required if n not in wanted and n in _KINDS]
        if wanted and wanted not in groups:
            groups.append(wanted)
    for group in groups:
        for kinds in itertools.islice(itertools.product(*(_KINDS[n] for n in group)), 12):
            yield tuple(Input(n, k) for n, k in zip(group, kinds, strict=True))


def _ids(case: Case, m: Model) -> Any:
    import torch

    top = min(VOCABULARY, FIRST_SPECIAL, m.sizes("vocab_size", VOCABULARY))
    text = torch.randint(4, max(5, top), (case.batch, case.length))
    if not m.tokens:
        return text
    special = m.sizes("image_token_id image_token_index audio_token_id audio_token_index media_token_id image_token", FIRST_SPECIAL)
    return torch.cat([torch.full((case.batch, m.tokens), special), text], 1)


def _mask(case: Case, m: Model) -> Any:
    import torch

    seen = _feeds.mask(case, case.length)
    return torch.cat([torch.ones(case.batch, m.tokens, dtype=torch.long), seen], 1) if m.tokens else seen


def _decoder_ids(case: Case, m: Model) -> Any:
    import torch

    top = min(VOCABULARY, FIRST_SPECIAL, m.sizes("vocab_size", VOCABULARY))
    return torch.randint(4, max(5, top), (case.batch, 5 if case.length > 7 else 9))


def _boxes(case: Case, m: Model) -> Any:
    import torch

    corner = torch.randint(0, 50, (case.batch, case.length, 2))
    return torch.cat([corner, corner + torch.randint(1, 40, (case.batch, case.length, 2))], -1)


def _random(*shape: int) -> Any:
    import torch

    return torch.randn(*shape)


def _pixels(m: Model) -> tuple[int, int, int]:
    side = m.sizes("image_size img_size", m.image or 64)
    return m.sizes("num_channels in_channels in_chans", 3), side, side


def _patches(case: Case, m: Model) -> Any:
    patch, time = m.sizes("patch_size", 8), m.sizes("temporal_patch_size", 1)
    return _random(case.batch * 16, 3 * time * patch * patch)


def _grid(case: Case, m: Model) -> Any:
    import torch

    return torch.tensor([[1, 4, 4]] * case.batch)


def _frames(m: Model) -> int:
    return 2 * m.sizes("max_source_positions", 0) or m.sizes("max_length", 0) or 96


def _mels(m: Model) -> int:
    return m.sizes("num_mel_bins n_mels mel_bins input_feat_per_channel feature_size input_feature_size num_mels input_dim", 80)


def _history(m: Model) -> int:
    """The steps of a series that a model wants to see: its context, and as many as it looks back from there."""
    return m.sizes("context_length", 24) + max(getattr(m.sizes.config, "lags_sequence", None) or [0])


_MAKERS: dict[str, Any] = {
    "ids": _ids, "mask": _mask, "decoder ids": _decoder_ids, "boxes": _boxes, "patches": _patches, "grid": _grid,
    "image": lambda c, m: _random(c.batch, *_pixels(m)),
    "video": lambda c, m: _random(c.batch, m.sizes("num_frames frames_per_clip", 2), *_pixels(m)),
    "images": lambda c, m: _random(c.batch, 1, *_pixels(m)),
    "video channels first": lambda c, m: _random(c.batch, _pixels(m)[0], m.sizes("num_frames frames_per_clip", 2), *_pixels(m)[1:]),
    "mels, time": lambda c, m: _random(c.batch, _mels(m), _frames(m)),
    "time, mels": lambda c, m: _random(c.batch, _frames(m), _mels(m)),
    "channel, time, mels": lambda c, m: _random(c.batch, 1, _frames(m), _mels(m)),
    "wave": lambda c, m: _random(c.batch, 1600 if c.length > 7 else 2400),
    "channel, wave": lambda c, m: _random(c.batch, 1, 3840 if c.length > 7 else 5760),
    "states": lambda c, m: _random(c.batch, c.length, m.sizes("hidden_size d_model", WIDTH)),
    "fixed states": lambda c, m: _random(c.batch, 10, m.sizes("encoder_hidden_size hidden_size d_model", WIDTH)),
    "series": lambda c, m: _random(c.batch, _history(m)),
    "channels of series": lambda c, m: _random(c.batch, m.sizes("context_length", 24), m.sizes("num_input_channels", 1)),
    "series features": lambda c, m: _random(c.batch, _history(m), m.sizes("num_time_features", 1)),
    "series seen": lambda c, m: _random(c.batch, _history(m)).abs() * 0 + 1,
}  # fmt: skip
_KINDS: dict[str, tuple[str, ...]] = {
    "input_ids": ("ids",), "attention_mask": ("mask",), "decoder_input_ids": ("decoder ids",), "bbox": ("boxes",),
    "pixel_values": ("image", "video", "images", "patches", "video channels first"), "pixel_values_videos": ("video", "video channels first"),
    "flattened_patches": ("patches",), "hidden_states": ("patches", "states"), "image_grid_thw": ("grid",), "grid_thw": ("grid",),
    "input_features": ("mels, time", "time, mels", "channel, time, mels"), "input_values": ("wave", "channel, wave", "time, mels", "mels, time"),
    "audio_values": ("wave", "channel, wave"), "inputs_embeds": ("states",), "encoder_hidden_states": ("fixed states",),
    "query_embeds": ("fixed states",), "past_values": ("series", "channels of series"), "past_time_features": ("series features",),
    "past_observed_mask": ("series seen",), "inputs": ("ids",), "decoder_inputs_embeds": ("states",), "x": ("states",), "audio_codes": ("ids",),
    "embeddings": ("states",), "pixel_embeds": ("states",), "text_ids": ("ids",), "visual_embeds": ("fixed states",),
}  # fmt: skip
_LONG = {"ids", "decoder ids", "wave", "states", "channel, wave"}  # their second axis follows the length of the case
_VISUAL = {"image", "video", "images", "patches", "video channels first", "grid"}
_SOUND = {"mels, time", "time, mels", "channel, time, mels", "wave", "channel, wave"}
_AXES = {"ids": "seq", "mask": "seq", "boxes": "seq", "decoder ids": "dec_seq", "states": "seq"}

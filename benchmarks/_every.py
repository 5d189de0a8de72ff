"""Every architecture that transformers knows: a small model of it, by the names of its configuration and of its inputs alone."""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import itertools
import re
from collections.abc import Mapping
from typing import Any

import _count
from _feeds import Case
from _inputs import AXES, LONG, MAKERS, SOUND, VISUAL, Sizes, plans
from _shrink import IMAGES, WIDTH, small
from _special import LENGTHS, OVERRIDES
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


class Model:
    """A small model of a type. As zoo.Model: a torch module that takes the inputs in order and gives a tuple of arrays, and its feeds.

    Raises:
        NoModel: no size and no choice of inputs gives a model whose forward pass runs; the reason of the last.
    """

    def __init__(self, name: str, implementation: str) -> None:
        self.name = name
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
        text, visual, decoder = bool(kinds & {"ids", "mask", "boxes"}), bool(kinds & VISUAL), "decoder ids" in kinds
        sound = bool(kinds & SOUND)
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
        return (Case(2, long), Case(1, short), Case(3, long)) if kinds & LONG else (Case(2, long), Case(1, long), Case(3, long))

    def _feed(self, case: Case, seed: int) -> dict[str, Any]:
        import torch

        torch.manual_seed(seed)
        return {i.name: MAKERS[i.kind](case, self) for i in self.plan}

    def axes(self, name: str) -> dict[int, str]:
        """The axes of an input that differ between its feeds; equal names are equal sizes."""
        feeds, cases = [feed[name] for _, feed in self.feeds()], self.cases()
        kind = next(i.kind for i in self.plan if i.name == name)
        varied = [k for k in range(feeds[0].ndim) if len({t.shape[k] for t in feeds}) > 1]
        batch = all(len(t) == c.batch for t, c in zip(feeds, cases, strict=True))
        return {k: "batch" if k == 0 and batch else AXES.get(kind, f"{name}_{k}") if k else f"{name}_0" for k in varied}

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

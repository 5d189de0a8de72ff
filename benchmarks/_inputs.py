"""What a model of any architecture is fed, by the names of the parameters of its forward call."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import _feeds
from _feeds import Case
from _shrink import FIRST_SPECIAL, VOCABULARY, WIDTH
from _special import INPUTS

if TYPE_CHECKING:
    from _every import Model


@dataclasses.dataclass(frozen=True)
class Input:
    """One input of a forward call: the parameter's name, and how its tensor is made (a key of MAKERS)."""

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


MAKERS: dict[str, Any] = {
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
LONG = {"ids", "decoder ids", "wave", "states", "channel, wave"}  # their second axis follows the length of the case
VISUAL = {"image", "video", "images", "patches", "video channels first", "grid"}
SOUND = {"mels, time", "time, mels", "channel, time, mels", "wave", "channel, wave"}
AXES = {"ids": "seq", "mask": "seq", "boxes": "seq", "decoder ids": "dec_seq", "states": "seq"}

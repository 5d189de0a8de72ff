"""Small configurations for any architecture of transformers, by the names of its fields."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

WIDTH, FFN, HEADS, HEAD_DIM, VOCABULARY, LENGTH = 64, 128, 4, 16, 160, 128
FIRST_SPECIAL = 100  # ids of images and the like; feeds use the ids below it

_LAYERS = re.compile(
    r"(num_|n_)?((encoder|decoder|text|vision|hidden|pred|prompt|num|n|[lxr]|fusion|audio|attention|backbone)_)*(hidden_)?layers?|depth|num_blocks"
    r"|num_self_attends_per_block|n_layer|encoder_layer_num|num_encoder_blocks_per_stage"
)
_KEPT_LAYERS = {"num_feature_layers", "conv_layers", "num_conv_layers"}
_WIDTHS = re.compile(
    r"(cross_|vision_|text_|audio_|encoder_|decoder_|cross_attention_|out_|output_|input_|projector_|shared_|global_|pred_|prompt_|conditioning_|multimodal_"
    r"|mm_|entity_|lexical_|query_|visual_|memory_attention_|mask_decoder_|aux_|memory_|perceiver_|fpn_|qformer_|abstractor_)*"
    r"(hidden_size|embed_dim|emb_dim|embedding_size|embedding_dim|hidden_dim|projection_dim|proj_dim|output_dim|d_model|n_embd|dim|d_latents|"
    r"qk_channels|v_channels|word_embed_proj_dim|embed_size|projection_size|output_size|hidden_channels|embed_proj_dim|hid_dim|conv_out|latent_dim|proj_size|channels_out)"
)
_FFN = re.compile(
    r".*(ffn_dim|intermediate_size|intermediate_dim|ffn_hidden_size|mlp_dim|d_ff|n_inner|d_inner|dff|feedforward_size|feedforward_dim|mlp_hidden_size|dim_feedforward)"
)
_EXPERT_WIDTH = re.compile(r".*(moe|expert).*(intermediate|ffn|hidden|width|latent).*")
_HEADS = re.compile(r".*(attention_heads|num_heads|n_heads?|nhead|attn_heads|self_attention_heads|heads)")
_SHARED_HEADS = re.compile(r".*(key_value_heads|kv_heads|multi_query_group_num|query_groups)")
_HEAD_DIM = re.compile(r".*(head_dim|d_kv|d_head|head_size|key_dim|headdim|kv_channels)")
_EXPERTS = re.compile(r"(.*_)?(num|n)_?(.*_)?experts|n_routed_experts|moe_num_experts")
_PICKED = re.compile(r".*(experts_per_tok(en)?|top_?k(_experts)?|moe_k|topk|k_per_tok)")
_IDS = re.compile(r".*(token_id|token_index|_id|_token|_ids|_tokens|token_ids)")
_MODAL = re.compile(r".*(image|audio|video|vision|speech|visual|frame|patch|im_|boi|eoi|boa|eoa|row|mask_token|point|time).*")
_WINDOWS = re.compile(r"sliding_window|local_attention|attention_chunk_size|window_size_1d|local_window_size|attention_window_size|.*sliding_window")
_SMALL = {
    "qk_rope_head_dim": 8, "qk_nope_head_dim": HEAD_DIM, "qk_head_dim": 24, "q_lora_rank": 32, "kv_lora_rank": 32, "o_lora_rank": 32,
    "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "num_expert_group": 1, "n_shared_experts": 1, "num_query_tokens": 8, "num_queries": 8,
    "num_latents": 8, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_num_heads": 8, "mamba_head_dim": 16, "mamba_d_ssm": 128, "mamba_d_state": 16,
    "mamba_n_groups": 1, "n_groups": 1, "ssm_state_size": 16, "mamba_headdim": 16, "mamba_ngroups": 1, "state_size": 16, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16, "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4, "max_window_layers": 1, "index_n_heads": 4, "index_head_dim": 32, "index_topk": 16, "lru_width": WIDTH,
    "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": VOCABULARY, "num_kv_shared_layers": 0, "altup_num_inputs": 2,
    "laurel_rank": 8, "max_source_positions": 32, "max_target_positions": LENGTH, "num_object_queries": 8, "two_stage_num_proposals": 8,
    "attention_hidden_size": WIDTH, "intermediate_size_mlp": FFN, "num_mem_blocks": 1, "chunk_size": 16, "mamba_chunk_size": 16,
    "expert_layer_period": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_offset": 1, "query_pre_attn_scalar": 16,
    "rel_pos_bins": 32, "rotary_dim": 8, "max_2d_position_embeddings": 128, "max_rel_pos": 128, "num_detection_tokens": 4, "max_image_length": -1,
}  # fmt: skip


IMAGES = (32, 64, 0)  # pixels on a side to try; 0 = as the configuration has it


def small(kind: type, image: int, overrides: Mapping[str, Any]) -> Any:
    """An instance of a configuration class. `image`: one of IMAGES; `overrides`: dotted field -> value, for what the rules cannot know."""
    return _shrunk(kind(), image, overrides)


def _shrunk(config: Any, image: int, overrides: Mapping[str, Any]) -> Any:
    given = {k: v for k, v in vars(config).items() if not k.startswith("_")}
    allowed = {f.name for f in dataclasses.fields(config)} if dataclasses.is_dataclass(config) else set(given)
    layers = [v for k, v in given.items() if isinstance(v, int) and _is_layers(k)]
    kinds = _kinds(given.get("layer_types"))
    count = max(2, len(kinds))
    made: dict[str, Any] = {}
    for name, value in given.items():
        inner = {k.partition(".")[2]: v for k, v in overrides.items() if k.startswith(f"{name}.")}
        if value is None and name in allowed:
            value = _missing(name)
        if name not in allowed or value is None or isinstance(value, (bool, str)):
            continue
        if hasattr(value, "sub_configs"):
            made[name] = _shrunk(value, image, inner)
        elif name == "layer_types" and kinds:
            made[name] = [kinds[k % len(kinds)] for k in range(count)]
        elif isinstance(value, (list, tuple)) and layers and len(value) in layers and len(value) > 3:
            made[name] = _first(value, count)
        else:
            made[name] = _value(name, value, given, image, count)
    made |= {
        k: made.get(k, given[k]) | v if isinstance(v, dict) and isinstance(given.get(k), dict) else v for k, v in overrides.items() if "." not in k
    }
    kept = {k: v for k, v in made.items() if k in overrides or v is not given[k]}
    strings = {k: v for k, v in given.items() if k in allowed and isinstance(v, (str, bool)) and k not in ("transformers_version", "model_type")}
    return type(config)(**strings | kept)


def _missing(name: str) -> int | None:
    """A number for a field that has no default and that no model can do without."""
    if _PICKED.fullmatch(name):
        return 2
    if _EXPERTS.fullmatch(name):
        return 4
    return VOCABULARY if name == "vocab_size" else None


def _kinds(types: Any) -> list[str]:
    return list(dict.fromkeys(types)) if isinstance(types, (list, tuple)) and all(isinstance(t, str) for t in types) else []


def _first(values: Sequence[Any], count: int) -> Any:
    """Of a list with an entry for each layer, entries of every kind."""
    distinct = list({repr(v): v for v in values}.values())
    return type(values)([distinct[k % len(distinct)] for k in range(count)])


def _is_layers(name: str) -> bool:
    return name not in _KEPT_LAYERS and _LAYERS.fullmatch(name) is not None


def _value(name: str, value: Any, config: Mapping[str, Any], image: int, layers: int) -> Any:
    if isinstance(value, dict):
        return _rope(value) if name.startswith(("rope", "text_rope")) else value
    if isinstance(value, (list, tuple)):
        return _list(name, value, image, layers)
    if not isinstance(value, int):
        return value
    return _count(name, value, layers) if _is_layers(name) or "vocab" in name else _width(name, value, config, image, layers)


def _count(name: str, value: int, layers: int) -> int:
    """Layers, vocabularies, experts, ids."""
    if _is_layers(name):
        return min(value, layers)
    if "vocab" in name:
        return VOCABULARY if value > VOCABULARY else value
    if _PICKED.fullmatch(name):
        return min(value, 2)
    if _EXPERTS.fullmatch(name):
        return min(value, 4)
    if _IDS.fullmatch(name):
        return _id(name, value)
    return value


def _width(name: str, value: int, config: Mapping[str, Any], image: int, layers: int) -> int:
    if name in _SMALL:
        return _SMALL[name] if value > 0 else value
    counted = _count(name, value, layers)
    if counted != value or _PICKED.fullmatch(name) or _EXPERTS.fullmatch(name):
        return counted
    heads = next((v for k, v in config.items() if _HEADS.fullmatch(k) and not _SHARED_HEADS.fullmatch(k) and isinstance(v, (list, tuple))), None)
    if name == "image_size" or name == "img_size":
        return image or value
    if name == "patch_size":
        return 8 if value > 8 else value
    if _SHARED_HEADS.fullmatch(name):
        return 1 if value == 1 else HEADS if value >= _full_heads(config) else HEADS // 2
    if _HEAD_DIM.fullmatch(name):
        return HEAD_DIM
    if _HEADS.fullmatch(name):
        return HEADS if value > 1 else value
    if _EXPERT_WIDTH.fullmatch(name):
        return 32
    if _FFN.fullmatch(name) or (name == "hidden_dim" and "dim" in config):
        return FFN
    if _WIDTHS.fullmatch(name) and value > 1:
        return HEAD_DIM * heads[0] if heads and isinstance(heads[0], int) else WIDTH
    if _WINDOWS.fullmatch(name) and value > 8:
        return 5
    if name in ("n_ctx", "n_positions", "max_seq_len", "max_seq_length", "seq_length", "max_length") or ("position" in name and value > 256):
        return min(value, LENGTH)
    return value


def _full_heads(config: Mapping[str, Any]) -> int:
    found = [v for k, v in config.items() if isinstance(v, int) and _HEADS.fullmatch(k) and not _SHARED_HEADS.fullmatch(k)]
    return max(found, default=0)


def _id(name: str, value: int) -> int:
    if _MODAL.fullmatch(name):
        return FIRST_SPECIAL + sum(map(ord, name)) % 59
    return value if value < FIRST_SPECIAL else {"p": 0, "b": 1, "e": 2, "d": 1}.get(name.rpartition("decoder_")[2][:1], 3)


def _list(name: str, value: Any, image: int, layers: int) -> Any:
    if not value or not all(isinstance(v, int) and not isinstance(v, bool) for v in value):
        return value
    if name in (
        "depths",
        "encoder_depths",
        "decoder_depths",
        "num_layers",
        "block_sizes",
        "encoder_layers",
        "layers",
        "layer_depths",
        "stage_repeats",
        "depth",
    ):
        return type(value)(min(v, 1) for v in value)
    if "index" in name or "indices" in name or "indexes" in name or name.endswith("_layers"):
        return type(value)(dict.fromkeys(min(v, layers - 1) for v in value))
    if name == "conv_dim":
        return type(value)(32 for _ in value)
    if _IDS.fullmatch(name):
        return type(value)(_id(name, v) for v in value)
    if name == "image_size" and image:
        return type(value)(image for _ in value)
    if name == "mrope_section":
        return _sections(value)
    return value


def _sections(value: Sequence[int]) -> Any:
    """The pieces of a rotary embedding in the same shares, for the small head."""
    total, wanted = sum(value), HEAD_DIM // 2
    parts = [v * wanted // total for v in value[1:]]
    return type(value)([wanted - sum(parts), *parts])


def _rope(value: dict[str, Any]) -> dict[str, Any]:
    made = {k: _sections(v) if k == "mrope_section" else _rope(v) if isinstance(v, dict) else v for k, v in value.items()}
    return made | {k: v[: HEAD_DIM // 2] for k, v in value.items() if k in ("long_factor", "short_factor")}

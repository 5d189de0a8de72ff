"""What the rules of _shrink.py and _every.py cannot know of single architectures: fields, lengths of text, inputs."""

from __future__ import annotations

from typing import Any


def _sections(*parts: int, field: str = "rope_parameters") -> dict[str, Any]:
    return {field: {"mrope_section": list(parts)}}


_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_BACKBONE = {
    "backbone_config": {
        "model_type": "resnet", "embedding_size": 16, "hidden_sizes": [16, 32, 32, 64], "depths": [1, 1, 1, 1], "layer_type": "basic",
        "out_features": ["stage4"],
    }
}  # fmt: skip
_HEAD = {"head_dim": 16}
_EXPERTS = {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}
_COMPASS = {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}}

# dotted field -> value
OVERRIDES: dict[str, dict[str, Any]] = {
    "glm4v_text": _sections(2, 3, 3), "glm_image_text": _sections(2, 3, 3), "glm_ocr_text": _sections(2, 3, 3),
    "glm4v_moe_text": _sections(1, 1, 2), "ernie4_5_vl_moe_text": _sections(3, 3, 2) | {"moe_intermediate_size": [32, 32]},
    "glm4v": _sections(2, 3, 3, field="text_config.rope_parameters"), "glm_image": _sections(2, 3, 3, field="text_config.rope_parameters"),
    "glm_ocr": _sections(2, 3, 3, field="text_config.rope_parameters"), "glm46v": _sections(2, 3, 3, field="text_config.rope_parameters"),
    "glm4v_moe": _sections(1, 1, 2, field="text_config.rope_parameters"),
    "ernie4_5_vl_moe": _sections(3, 3, 2, field="text_config.rope_parameters") | {"text_config.moe_intermediate_size": [32, 32]},
    "esm": {"pad_token_id": 1, "mask_token_id": 3, "position_embedding_type": "rotary"},
    "diffusion_gemma_text": _EXPERTS, "diffusion_gemma": {f"text_config.{k}": v for k, v in _EXPERTS.items()},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "dense"]}, "deepseek_ocr2": {"text_config.mlp_layer_types": ["dense", "dense"]},
    "cohere_compass_text": _COMPASS, "cohere_compass": {f"text_config.{k}": v for k, v in _COMPASS.items()},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
             "ffn_config": {"ffn_hidden_size": 128, "moe_num_experts": 4, "moe_top_k": 2}},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "hunyuan_v1_dense": _HEAD, "hunyuan_v1_moe": _HEAD, "hunyuan_vl_text": _HEAD, "hunyuan_vl": {"text_config.head_dim": 16},
    "hy_v4_vl_text": _sections(2, 1, 1), "hy_v4_vl": _sections(2, 1, 1, field="text_config.rope_parameters"),
    "detr": _BACKBONE, "conditional_detr": _BACKBONE, "deformable_detr": _BACKBONE, "dab-detr": _BACKBONE | {"query_dim": 4},
    "table-transformer": _BACKBONE,
}  # fmt: skip

# the longer and the shorter text
LENGTHS: dict[str, tuple[int, int]] = {}

# parameter and kind of every input
INPUTS: dict[str, tuple[tuple[str, str], ...]] = {
    "blip_2_qformer": (("query_embeds", "states"), ("encoder_hidden_states", "fixed states")),
    "idefics2_perceiver": (("context", "fixed states"),),
    "instructblip_qformer": (("query_embeds", "states"), ("encoder_hidden_states", "fixed states")),
}

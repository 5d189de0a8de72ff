"""The table of the zoo: every architecture, small, with what it is fed and how many attention blocks it has."""

from __future__ import annotations

import dataclasses
from typing import Any

from _feeds import HEAD_DIM, HEADS, IMAGE, MELS, VOCABULARY, WIDTH

LAYERS = 2


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One row. `config` and `model` are classes of transformers, or "" for a model of _modules.py.

    `kind` names the inputs (_feeds.INPUTS), `call` holds more keyword arguments of the forward call, `routes` the routes that differ
    (a model with one implementation of attention gives the same file by two routes), `outputs` are more outputs than the first.
    """

    config: str
    model: str
    overrides: dict[str, Any]
    kind: str
    blocks: int
    call: dict[str, Any] = dataclasses.field(default_factory=dict)
    implementation: str = ""
    outputs: tuple[str, ...] = ()


_SIZES = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": 2 * WIDTH}
_TEXT = _SIZES | {"vocab_size": VOCABULARY, "max_position_embeddings": 64}
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_DECODER = _TEXT | _SPECIAL | {"num_key_value_heads": 2, "head_dim": HEAD_DIM}
_NO_HEAD_DIM = {k: v for k, v in _DECODER.items() if k != "head_dim"}
_GPT = {"vocab_size": VOCABULARY, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2}
_SEQ2SEQ = _SPECIAL | {
    "vocab_size": VOCABULARY, "d_model": WIDTH, "encoder_layers": LAYERS, "decoder_layers": LAYERS, "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS, "encoder_ffn_dim": 2 * WIDTH, "decoder_ffn_dim": 2 * WIDTH, "max_position_embeddings": 64,
    "decoder_start_token_id": 1,
}  # fmt: skip
_T5 = {"vocab_size": VOCABULARY, "d_model": WIDTH, "d_kv": HEAD_DIM, "d_ff": 2 * WIDTH, "num_layers": LAYERS, "num_heads": HEADS}
_T5_FULL = _T5 | {"num_decoder_layers": LAYERS, "decoder_start_token_id": 0}
_IMAGE = _SIZES | {"image_size": IMAGE, "patch_size": 8}
_WAVE = _SIZES | {
    "conv_dim": [32, 32], "conv_stride": [5, 4], "conv_kernel": [10, 8], "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4, "vocab_size": VOCABULARY,
}  # fmt: skip
_SWIN = {"image_size": IMAGE, "patch_size": 2, "embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
_WHISPER = {k: v for k, v in _SEQ2SEQ.items() if k != "max_position_embeddings"} | {
    "num_mel_bins": MELS, "max_source_positions": 32, "max_target_positions": 32,
}  # fmt: skip
_NO_CACHE = {"use_cache": False}
_FALCON = {"new_decoder_architecture": False, "alibi": False}
_MLA = {
    "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 24, "first_k_dense_replace": 2,
    "num_key_value_heads": HEADS,
}  # fmt: skip
_OWN_KEYS = {"vocab_size": VOCABULARY, "hidden_size": WIDTH}
_OWN_KEYS_2 = {"vocab_size": VOCABULARY, "d_model": WIDTH}


def _text(name: str, over: dict[str, Any] | None = None, blocks: int = LAYERS, **options: Any) -> Architecture:
    return Architecture(f"{name}Config", f"{name}Model", _TEXT | (over or {}), options.pop("kind", "text"), blocks, **options)


def _decoder(name: str, over: dict[str, Any] | None = None, base: dict[str, Any] = _DECODER, **options: Any) -> Architecture:
    model = options.pop("model", f"{name}ForCausalLM")
    call = options.pop("call", _NO_CACHE)
    return Architecture(f"{name}Config", model, base | (over or {}), options.pop("kind", "text"), options.pop("blocks", LAYERS), call, **options)


def _seq2seq(name: str, model: str, over: dict[str, Any] | None = None, base: dict[str, Any] = _SEQ2SEQ, **options: Any) -> Architecture:
    return Architecture(f"{name}Config", model, base | (over or {}), options.pop("kind", "seq2seq"), 3 * LAYERS, _NO_CACHE, **options)


def _image(name: str, model: str = "", over: dict[str, Any] | None = None, base: dict[str, Any] = _IMAGE, blocks: int = LAYERS) -> Architecture:
    return Architecture(f"{name}Config", model or f"{name}Model", base | (over or {}), "image", blocks)


def _wave(name: str, over: dict[str, Any] | None = None, kind: str = "wave") -> Architecture:
    return Architecture(f"{name}Config", f"{name}Model", _WAVE | (over or {}), kind, LAYERS)


def _module(kind: str, blocks: int) -> Architecture:
    return Architecture("", "", {}, kind, blocks, implementation="sdpa")


ZOO: dict[str, Architecture] = {
    # the architectures of the first comparison with the peers
    "bert": _text("Bert"),
    "roberta": _text("Roberta"),
    "distilbert": Architecture("DistilBertConfig", "DistilBertModel", {
        "vocab_size": VOCABULARY, "dim": WIDTH, "n_layers": LAYERS, "n_heads": HEADS, "hidden_dim": 2 * WIDTH, "max_position_embeddings": 64},
        "text", LAYERS),
    "albert": _text("Albert", {"embedding_size": 32}),
    "electra": _text("Electra", {"embedding_size": 32}),
    "gpt2": _decoder("GPT2", base=_GPT, model="GPT2LMHeadModel"),
    "gpt-neox": _decoder("GPTNeoX", base=_TEXT | {"bos_token_id": 1, "eos_token_id": 2}),
    "llama": _decoder("Llama"),
    "mistral": _decoder("Mistral", {"sliding_window": 5}),
    "qwen2": _decoder("Qwen2"),
    "qwen3": _decoder("Qwen3"),
    "gemma": _decoder("Gemma"),
    "t5-encoder": Architecture("T5Config", "T5EncoderModel", _T5, "text", LAYERS),
    "t5": _seq2seq("T5", "T5ForConditionalGeneration", base=_T5_FULL),
    "bart": _seq2seq("Bart", "BartForConditionalGeneration"),
    "whisper": _seq2seq("Whisper", "WhisperForConditionalGeneration", base=_WHISPER, kind="audio"),
    "wav2vec2": _wave("Wav2Vec2"),
    "vit": _image("ViT", "ViTForImageClassification"),
    "deit": _image("DeiT", "DeiTForImageClassification"),
    "dinov2": _image("Dinov2", over={"mlp_ratio": 2}),
    "clip-vision": _image("CLIPVision", "CLIPVisionModel"),
    "clip-text": Architecture("CLIPTextConfig", "CLIPTextModel", _TEXT | {"eos_token_id": 2}, "text", LAYERS),
    # torch's own layers, and timm
    "torch-encoder": _module("tensor+padding", 2),
    "torch-encoder-prenorm": _module("tensor+padding", 2),
    "torch-transformer": _module("pair", 6),
    "torch-mha-padding": _module("tensor+padding", 1),
    "torch-mha-bias": _module("tensor+bias", 1),
    "torch-mha-weights": _module("tensor+padding", 1),
    "torch-mha-seq-first": _module("tensor+bias", 1),
    "timm-vit": _module("image", 2),
    "timm-vit-qknorm": _module("image", 2),
    "timm-swin": _module("image", 4),
    "timm-swinv2": _module("image", 4),
    # caches
    "llama-past": _decoder("Llama", kind="past", call={"use_cache": True}),
    "gpt2-past": _decoder("GPT2", base=_GPT, model="GPT2LMHeadModel", kind="past", call={"use_cache": True}),
    "gpt-neox-past": _decoder("GPTNeoX", base=_TEXT | {"bos_token_id": 1, "eos_token_id": 2}, kind="past", call={"use_cache": True}),
    # windows and relative positions in images
    "swin": _image("Swin", base=_SWIN, blocks=4),
    "swinv2": _image("Swinv2", base=_SWIN, blocks=4),
    "beit": _image("Beit", over={"use_relative_position_bias": True}),
    "beit-shared": _image("Beit", over={"use_shared_relative_position_bias": True}),
    "segformer": _image(
        "Segformer", base={
            "num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [4, 1], "hidden_sizes": [32, 64], "patch_sizes": [7, 3], "strides": [4, 2],
            "num_attention_heads": [1, 4], "mlp_ratios": [2, 2],
        },
    ),
    "pvt": _image(
        "Pvt", base={
            "image_size": IMAGE, "num_encoder_blocks": 2, "depths": [1, 1], "sequence_reduction_ratios": [2, 1], "hidden_sizes": [32, 64],
            "patch_sizes": [4, 2], "strides": [4, 2], "num_attention_heads": [1, 4], "mlp_ratios": [2, 2],
        },
    ),
    "siglip-vision": _image("SiglipVision", "SiglipVisionModel"),
    "dinov3": _image("DINOv3ViT", "DINOv3ViTModel"),
    "yolos": _image("Yolos", over={"image_size": [IMAGE, IMAGE], "num_detection_tokens": 3}),
    "levit": Architecture("LevitConfig", "LevitModel", {
        "image_size": 2 * IMAGE, "hidden_sizes": [32, 48, 64], "num_attention_heads": [2, 3, 4], "depths": [1, 1, 1], "key_dim": [8, 8, 8],
        "attention_ratio": [2, 2, 2], "mlp_ratio": [2, 2, 2], "drop_path_rate": 0}, "large image", 5),
    # encoders
    "xlm-roberta": _text("XLMRoberta"),
    "mpnet": _text("MPNet"),
    "deberta": _text("Deberta", {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 16}),
    "deberta-v2": _text("DebertaV2", {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8, "share_att_key": True,
                                      "norm_rel_ebd": "layer_norm", "max_relative_positions": 16}),
    "xlnet": Architecture("XLNetConfig", "XLNetModel", _OWN_KEYS_2 | {"n_layer": LAYERS, "n_head": HEADS, "d_inner": 2 * WIDTH}, "text", LAYERS),
    "esm": _text("Esm", {"position_embedding_type": "rotary", "pad_token_id": 1, "mask_token_id": 3, "token_dropout": False}),
    "mobilebert": _text("MobileBert", {"embedding_size": 32, "intra_bottleneck_size": 32, "num_feedforward_networks": 2}),
    "squeezebert": _text("SqueezeBert", {"embedding_size": WIDTH}),
    "layoutlm": _text("LayoutLM", {"max_2d_position_embeddings": 128}, kind="layout"),
    "roformer": _text("RoFormer", {"embedding_size": WIDTH}),
    "modernbert": _text("ModernBert", {**_SPECIAL, "cls_token_id": 1, "sep_token_id": 2, "global_attn_every_n_layers": 2, "local_attention": 6}),
    "convbert": _text("ConvBert", {"embedding_size": WIDTH, "head_ratio": 2, "conv_kernel_size": 3}),
    "funnel": Architecture("FunnelConfig", "FunnelBaseModel", _OWN_KEYS_2 | {
        "block_sizes": [1, 1], "num_decoder_layers": 0, "n_head": HEADS, "d_head": HEAD_DIM, "d_inner": 2 * WIDTH}, "text", LAYERS),
    "rembert": _text("RemBert", {"input_embedding_size": 32, "output_embedding_size": 32}),
    "megatron-bert": _text("MegatronBert"),
    "nomic-bert": _text("NomicBert"),
    "eurobert": _text("EuroBert", {"num_key_value_heads": 2, "head_dim": HEAD_DIM, **_SPECIAL}),
    "lxmert": Architecture("LxmertConfig", "LxmertModel", _OWN_KEYS | {
        "num_attention_heads": HEADS, "l_layers": 1, "x_layers": 1, "r_layers": 1, "intermediate_size": 2 * WIDTH, "visual_feat_dim": 24},
        "text+regions", 4),  # the image side of the last layer does not reach the output
    "bert-attentions": _text("Bert", call={"output_attentions": True}, implementation="eager", outputs=("attentions",)),
    "perceiver": Architecture("PerceiverConfig", "PerceiverForMaskedLM", {
        "vocab_size": VOCABULARY, "d_model": WIDTH, "d_latents": WIDTH, "num_latents": 6, "num_blocks": 1, "num_self_attends_per_block": 1,
        "num_self_attention_heads": HEADS, "num_cross_attention_heads": 2, "qk_channels": WIDTH, "v_channels": WIDTH, "max_position_embeddings": 12},
        "text", 3),
    # decoders
    "opt": _decoder("OPT", base=_OWN_KEYS | {
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "ffn_dim": 2 * WIDTH, "max_position_embeddings": 64, "word_embed_proj_dim": WIDTH,
        **_SPECIAL}),
    "bloom": _decoder("Bloom", base=_OWN_KEYS | {"n_layer": LAYERS, "n_head": HEADS, **_SPECIAL}),
    "falcon": _decoder("Falcon", _FALCON | {"multi_query": True}, base=_TEXT | _SPECIAL),
    "falcon-alibi": _decoder("Falcon", _FALCON | {"multi_query": False, "alibi": True, "parallel_attn": False}, base=_TEXT | _SPECIAL),
    "falcon-new": _decoder("Falcon", _FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}, base=_TEXT | _SPECIAL),
    "mpt": _decoder("Mpt", base=_OWN_KEYS_2 | {"n_layers": LAYERS, "n_heads": HEADS, "max_seq_len": 64, "expansion_ratio": 2}),
    "gptj": _decoder("GPTJ", {"rotary_dim": 8}, base=_GPT),
    "gpt-neo": _decoder("GPTNeo", base=_OWN_KEYS | {
        "num_layers": LAYERS, "num_heads": HEADS, "window_size": 5, "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 64,
        **_SPECIAL}),
    "codegen": _decoder("CodeGen", {"rotary_dim": 8}, base=_GPT),
    "gpt-bigcode": _decoder("GPTBigCode", {"multi_query": True}, base=_GPT),
    "starcoder2": _decoder("Starcoder2", {"sliding_window": 5}, base=_NO_HEAD_DIM),
    "phi": _decoder("Phi", {"partial_rotary_factor": 0.5}, base=_NO_HEAD_DIM),
    "phi3": _decoder("Phi3", base=_NO_HEAD_DIM),
    "gemma2": _decoder("Gemma2", {"sliding_window": 5, "query_pre_attn_scalar": 16}),
    "gemma3": _decoder("Gemma3Text", {"sliding_window": 5, "query_pre_attn_scalar": 16, "layer_types": ["sliding_attention", "full_attention"]},
                       model="Gemma3ForCausalLM"),
    "olmo": _decoder("Olmo", {"clip_qkv": 2.0}, base=_NO_HEAD_DIM),
    "olmo2": _decoder("Olmo2", base=_NO_HEAD_DIM),
    "stablelm": _decoder("StableLm", {"partial_rotary_factor": 0.25, "qk_layernorm": True}, base=_NO_HEAD_DIM),
    "cohere": _decoder("Cohere", {"use_qk_norm": True}, base=_NO_HEAD_DIM),
    "cohere2": _decoder("Cohere2", {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}),
    "granite": _decoder("Granite", {"attention_multiplier": 0.3, "logits_scaling": 2.0}, base=_NO_HEAD_DIM),
    "mixtral": _decoder("Mixtral", {"num_local_experts": 2, "num_experts_per_tok": 1}),
    "glm": _decoder("Glm", {"partial_rotary_factor": 0.5}),
    "persimmon": _decoder("Persimmon", base=_NO_HEAD_DIM),
    "nemotron": _decoder("Nemotron"),
    "xglm": _decoder("XGLM", base=_OWN_KEYS_2 | {
        "num_layers": LAYERS, "attention_heads": HEADS, "ffn_dim": 2 * WIDTH, "max_position_embeddings": 64, **_SPECIAL}),
    "biogpt": _decoder("BioGpt", base=_TEXT | _SPECIAL),
    "ctrl": _decoder("CTRL", {"dff": 2 * WIDTH}, base=_GPT, model="CTRLLMHeadModel"),
    "openai-gpt": Architecture("OpenAIGPTConfig", "OpenAIGPTLMHeadModel", _GPT, "text", LAYERS),
    "deepseek-v2": _decoder("DeepseekV2", _MLA, base=_NO_HEAD_DIM),
    "deepseek-v3": _decoder("DeepseekV3", _MLA, base=_NO_HEAD_DIM),
    "smollm3": _decoder("SmolLM3", {"no_rope_layers": [1, 0]}, base=_NO_HEAD_DIM),
    "gpt-oss": _decoder("GptOss", {"sliding_window": 5, "num_local_experts": 2, "num_experts_per_tok": 1,
                                   "layer_types": ["sliding_attention", "full_attention"]}),
    "helium": _decoder("Helium"),
    "exaone4": _decoder("Exaone4", {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}),
    "qwen3-moe": _decoder("Qwen3Moe", {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32}),
    "trocr": _decoder("TrOCR", {"is_decoder": True, "add_cross_attention": False}, base=_OWN_KEYS_2 | {
        "decoder_layers": LAYERS, "decoder_attention_heads": HEADS, "decoder_ffn_dim": 2 * WIDTH, "max_position_embeddings": 64, **_SPECIAL}),
    # encoder-decoders
    "marian": _seq2seq("Marian", "MarianMTModel", {"pad_token_id": 0}),
    "mbart": _seq2seq("MBart", "MBartForConditionalGeneration"),
    "m2m100": _seq2seq("M2M100", "M2M100ForConditionalGeneration"),
    "pegasus": _seq2seq("Pegasus", "PegasusForConditionalGeneration"),
    "blenderbot": _seq2seq("Blenderbot", "BlenderbotForConditionalGeneration"),
    "umt5": _seq2seq("UMT5", "UMT5ForConditionalGeneration", base=_T5_FULL | {"feed_forward_proj": "gated-gelu"}),
    "prophetnet": Architecture("ProphetNetConfig", "ProphetNetModel", _OWN_KEYS | {
        "num_encoder_layers": LAYERS, "num_decoder_layers": LAYERS, "num_encoder_attention_heads": HEADS, "num_decoder_attention_heads": HEADS,
        "encoder_ffn_dim": 2 * WIDTH, "decoder_ffn_dim": 2 * WIDTH, "max_position_embeddings": 64, "ngram": 2, **_SPECIAL},
        "seq2seq", 4 * LAYERS, _NO_CACHE),
    # audio
    "hubert": _wave("Hubert"),
    "wav2vec2-mask": _wave("Wav2Vec2", {"feat_extract_norm": "layer"}, kind="wave+mask"),
    "wavlm": _wave("WavLM", {"num_buckets": 16, "max_bucket_distance": 20}),
    "wav2vec2-conformer": _wave("Wav2Vec2Conformer", {"position_embeddings_type": "relative"}),
    "conformer-rotary": _wave("Wav2Vec2Conformer", {"position_embeddings_type": "rotary"}),
    "ast": Architecture("ASTConfig", "ASTModel", _SIZES | {
        "patch_size": 8, "frequency_stride": 8, "time_stride": 8, "max_length": 40, "num_mel_bins": MELS}, "mel", LAYERS),
    # text beside images
    "siglip-text": Architecture("SiglipTextConfig", "SiglipTextModel", _TEXT, "text", LAYERS),
    "vilt": Architecture("ViltConfig", "ViltModel", _IMAGE | {"vocab_size": VOCABULARY, "max_position_embeddings": 64, "max_image_length": -1},
                         "text+image", LAYERS),
    "blip-text": Architecture("BlipTextConfig", "BlipTextModel", _TEXT | _SPECIAL | {
        "is_decoder": False, "encoder_hidden_size": WIDTH}, "text", LAYERS),
}  # fmt: skip

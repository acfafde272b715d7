"""Converts the layouts in which reward models were published to that of transformers.

Pure functions of state dicts. A key that is neither mapped nor known to be superfluous is an error, and so is one that
transformers then misses (`dag.rewards.clip.load_strictly`): a mapping that is almost right gives plausible, wrong scores.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from dag.errors import RunError
from dag.rewards.weights import Component, State

# -- OpenAI CLIP and open_clip ------------------------------------------------------------------------------------

_CLIP_KEYS = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "logit_scale": "logit_scale",
}
# These are stored as (width, embedding); a Linear's weight is (embedding, width).
_CLIP_TRANSPOSED = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}
_CLIP_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_CLIP_SUPERFLUOUS = {"attn_mask", "input_resolution", "context_length", "vocab_size"}
_CLIP_LAYER = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)[._](weight|bias)")


def clip_component(key: str, state: State, config: Mapping[str, Any]) -> Component:
    """An OpenAI or open_clip state dict as (CLIPModel config, CLIPModel state).

    Args:
        config: CLIPConfig entries that replace what the shapes imply, e.g.
            {"vision_config": {"num_attention_heads": 16, "hidden_act": "gelu"}}.

    Raises:
        RunError: a key is unknown or missing; names it.
    """
    converted = dict(_clip_entries(key, state))
    return _clip_config(key, converted, config), converted


def _clip_entries(key: str, state: State) -> Iterator[tuple[str, Tensor]]:
    for name, value in state.items():
        layer = _CLIP_LAYER.fullmatch(name)
        if name in _CLIP_KEYS:
            yield _CLIP_KEYS[name], value
        elif name in _CLIP_TRANSPOSED:
            yield _CLIP_TRANSPOSED[name], value.T
        elif layer is not None and (layer[3] in _CLIP_BLOCK or layer[3] == "attn.in_proj"):
            yield from _clip_layer(layer, value)
        elif name not in _CLIP_SUPERFLUOUS:
            raise RunError(f"{key}: {name} is not a key of an OpenAI or open_clip CLIP file")


def _clip_layer(layer: re.Match[str], value: Tensor) -> Iterator[tuple[str, Tensor]]:
    visual, number, part, kind = layer.groups()
    prefix = f"{'vision' if visual else 'text'}_model.encoder.layers.{number}"
    if part == "attn.in_proj":  # (3 W, ...): queries, keys, values
        for name, rows in zip("qkv", value.chunk(3), strict=True):
            yield f"{prefix}.self_attn.{name}_proj.{kind}", rows
    else:
        yield f"{prefix}.{_CLIP_BLOCK[part]}.{kind}", value


def _clip_config(key: str, state: State, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The CLIPConfig that shapes imply; heads are 64 wide, as in OpenAI's models, unless overridden."""
    try:
        patches = state["vision_model.embeddings.patch_embedding.weight"]
        positions = len(state["vision_model.embeddings.position_embedding.weight"])
        words = state["text_model.embeddings.token_embedding.weight"]
        context = len(state["text_model.embeddings.position_embedding.weight"])
        embedding = len(state["text_projection.weight"])
        inner = {tower: len(state[f"{tower}_model.encoder.layers.0.mlp.fc1.weight"]) for tower in ("vision", "text")}
    except KeyError as error:
        raise RunError(f"{key}: the file lacks what becomes {error.args[0]}; is it a CLIP model?") from None
    patch, side = patches.shape[-1], round((positions - 1) ** 0.5)
    vision = {"image_size": side * patch, "patch_size": patch, **_tower(state, "vision", len(patches), inner)}
    # The end-of-text token is the vocabulary's last, start-of-text the one before.
    ends = {"bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1, "pad_token_id": len(words) - 1}
    text = {"vocab_size": len(words), "max_position_embeddings": context, **ends}
    text |= _tower(state, "text", words.shape[1], inner)
    for tower, section in (("vision_config", vision), ("text_config", text)):
        section |= {"projection_dim": embedding, **overrides.get(tower, {})}
    return {
        "model_type": "clip",
        "architectures": ["CLIPModel"],
        "projection_dim": embedding,
        "vision_config": vision,
        "text_config": text,
    }


def _tower(state: State, tower: str, width: int, inner: Mapping[str, int]) -> dict[str, Any]:
    layers = {name.split(".")[3] for name in state if name.startswith(f"{tower}_model.encoder.layers.")}
    return {
        "hidden_size": width,
        "intermediate_size": inner[tower],
        "num_hidden_layers": len(layers),
        "num_attention_heads": max(1, width // 64),
        "hidden_act": "quick_gelu",
    }


# -- ImageReward (BLIP) -------------------------------------------------------------------------------------------

_BLIP_VISION = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj.weight": "embeddings.patch_embedding.weight",
    "patch_embed.proj.bias": "embeddings.patch_embedding.bias",
    "norm.weight": "post_layernorm.weight",
    "norm.bias": "post_layernorm.bias",
}
_BLIP_BLOCK = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
# BLIP's contrastive heads, which ImageReward does not use, and a buffer.
_BLIP_SUPERFLUOUS = re.compile(r"blip\.((vision|text)_proj\.(weight|bias)|text_encoder\.embeddings\.position_ids)")
_BLIP_LAYER = re.compile(r"blocks\.(\d+)\.(.+)\.(weight|bias)")


def image_reward_components(key: str, state: State, config: Mapping[str, Any]) -> dict[str, Component]:
    """ImageReward.pt as "vision" (BlipVisionModel), "text" (BlipTextModel) and "head" (the linear layers).

    Args:
        config: {"vision": {...}, "text": {...}} overrides of ImageReward v1.0's architecture.

    Raises:
        RunError: a key is unknown; names it.
    """
    vision: State = {}
    text: State = {}
    head: State = {}
    for name, value in state.items():
        if name.startswith("blip.visual_encoder."):
            vision[_blip_vision_name(key, name)] = value
        elif _BLIP_SUPERFLUOUS.fullmatch(name):
            continue
        elif name.startswith("blip.text_encoder."):
            text[name.removeprefix("blip.text_encoder.")] = value
        elif name.startswith("mlp.layers."):
            head[name.removeprefix("mlp.")] = value
        else:
            raise RunError(f"{key}: {name} is not a key of ImageReward.pt")
    return {
        "vision": (_BLIP_VISION_CONFIG | dict(config.get("vision", {})), vision),
        "text": (_BLIP_TEXT_CONFIG | dict(config.get("text", {})), text),
        "head": ({}, head),
    }


def _blip_vision_name(key: str, name: str) -> str:
    short = name.removeprefix("blip.visual_encoder.")
    layer = _BLIP_LAYER.fullmatch(short)
    if short in _BLIP_VISION:
        return _BLIP_VISION[short]
    if layer is not None and layer[2] in _BLIP_BLOCK:
        return f"encoder.layers.{layer[1]}.{_BLIP_BLOCK[layer[2]]}.{layer[3]}"
    raise RunError(f"{key}: {name} is not a key of ImageReward.pt")


# BLIP-large's towers as ImageReward trained them; transformers' defaults are of another size and another epsilon.
_BLIP_VISION_CONFIG: dict[str, Any] = {
    "model_type": "blip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 16,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "attention_dropout": 0.0,
}
_BLIP_TEXT_CONFIG: dict[str, Any] = {
    "model_type": "blip_text_model",
    "vocab_size": 30524,
    "hidden_size": 768,
    "encoder_hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 512,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "is_decoder": True,  # it creates the cross-attention; the forward pass still asks for a bidirectional mask
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    # Tokens of text generation, which does not happen here; the defaults lie outside small vocabularies.
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
    "sep_token_id": None,
}

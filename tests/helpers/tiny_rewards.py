"""Builds rewards by name and options, and writes small random networks in the file layouts of the published ones."""

import json
from pathlib import Path
from typing import Any

import torch
from helpers.original_rewards import State, random_clip, random_head, random_image_reward
from pydantic import TypeAdapter

from dag.recipe import RewardTerm
from dag.rewards import build_reward
from dag.rewards.clip import EMBEDDED

VOCABULARY = len(json.loads((EMBEDDED / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"])
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "photo", "of", "cat", "two", "dog", "cats", "dogs", "&"]
# The number of heads is not in published files; these small networks have heads of width 8.
HEADS = {"vision_config": {"num_attention_heads": 4}, "text_config": {"num_attention_heads": 2}}
GELU = {tower: {**section, "hidden_act": "gelu"} for tower, section in HEADS.items()}
BLIP = {
    "vision": {
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "image_size": 32,
    },
    "text": {
        "vocab_size": len(WORDS) + 2,
        "hidden_size": 16,
        "encoder_hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
    },
}


def clip_state(seed: int = 1) -> State:
    return random_clip(seed, VOCABULARY, context=24, vision=32, text=16, embedding=20)


def head_state() -> State:
    return random_head(7, 20)


def image_reward_state() -> State:
    return random_image_reward(3, len(WORDS) + 2)


def section_of(name: str, **options: Any) -> Any:
    """The schema's section of a recipe's `reward: {name: ..., option: ...}`."""
    return TypeAdapter(RewardTerm).validate_python({"name": name, **options})


def reward_of(name: str, **options: Any) -> Any:
    """A recipe's reward, built on the CPU."""
    return build_reward(section_of(name, **options), torch.device("cpu"))


def saved(state: Any, path: Path) -> str:
    torch.save(state, path)
    return str(path)


def options_of(name: str, folder: Path) -> dict[str, Any]:
    """Write the files of a small network for a reward; returns the options that load it, {} if it needs no network."""
    architecture = BLIP if name == "image_reward" else GELU if name in ("pickscore", "hpsv2") else HEADS
    config = folder / "config.json"
    config.write_text(json.dumps(architecture), encoding="utf-8")
    clip = {"tokenizer": "embedded", "config": str(config)}
    if name == "aesthetic":
        files = {"path": saved(clip_state(), folder / "clip.pt"), "head": saved(head_state(), folder / "head.pth")}
        return files | clip
    if name in ("clip_score", "pickscore"):
        return {"path": saved(clip_state(), folder / "clip.pt"), **clip}
    if name == "hpsv2":
        return {"path": saved({"state_dict": clip_state()}, folder / "hps.pt"), **clip}
    if name == "image_reward":
        path = saved(image_reward_state(), folder / "ImageReward.pt")
        return {"path": path, "tokenizer": _bert_tokenizer(folder), "config": str(config)}
    return {}


def _bert_tokenizer(folder: Path) -> str:
    folder = folder / "bert"
    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": true, "tokenizer_class": "BertTokenizer"}')
    return str(folder)

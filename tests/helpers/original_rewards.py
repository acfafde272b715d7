"""The published reward models in plain tensor algebra, on the keys of their own weight files.

A reference for `dag.rewards`: it is written from the architectures and shares no code with transformers. It was compared with
the original programs (OpenAI's CLIP, open_clip's ViT-H as HPSv2 loads it, ImageReward) on random networks, where scores agree
to 2e-6. All is computed in float64, so that only the code under test rounds.

Legend: B pictures, P patches + 1, S tokens, W width, E embedding.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

State = dict[str, Tensor]
Activation = Callable[[Tensor], Tensor]


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def affine(state: State, name: str, x: Tensor) -> Tensor:
    return x @ state[f"{name}.weight"].double().T + state[f"{name}.bias"].double()


def normed(state: State, name: str, x: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return scaled * state[f"{name}.weight"].double() + state[f"{name}.bias"].double()


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, bias: Tensor | float = 0.0) -> Tensor:
    """Multi-head attention (B, S, W) of queries, keys and values; `bias` is added to the (B, heads, S, S) logits."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + bias).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)


def layers(state: State, prefix: str) -> Iterator[str]:
    number = 0
    while any(name.startswith(f"{prefix}.{number}.") for name in state):
        yield f"{prefix}.{number}"
        number += 1


# -- CLIP, as OpenAI and open_clip store it -----------------------------------------------------------------------


def clip_tower(state: State, prefix: str, x: Tensor, heads: int, act: Activation, bias: Tensor | float) -> Tensor:
    for layer in layers(state, f"{prefix}transformer.resblocks"):
        h = normed(state, f"{layer}.ln_1", x, 1e-5)
        weight, offset = state[f"{layer}.attn.in_proj_weight"].double(), state[f"{layer}.attn.in_proj_bias"].double()
        q, k, v = (h @ weight.T + offset).chunk(3, dim=-1)
        x = x + affine(state, f"{layer}.attn.out_proj", attention(q, k, v, heads, bias))
        h = act(affine(state, f"{layer}.mlp.c_fc", normed(state, f"{layer}.ln_2", x, 1e-5)))
        x = x + affine(state, f"{layer}.mlp.c_proj", h)
    return x


def clip_image(state: State, pixels: Tensor, heads: int, act: Activation) -> Tensor:
    """Unit embeddings (B, E) of preprocessed pixels (B, 3, height, width)."""
    kernel = state["visual.conv1.weight"].double()
    patches = functional.conv2d(pixels.double(), kernel, stride=kernel.shape[-1]).flatten(2).transpose(1, 2)
    first = state["visual.class_embedding"].double().expand(len(pixels), 1, -1)
    x = torch.cat([first, patches], dim=1) + state["visual.positional_embedding"].double()
    x = clip_tower(state, "visual.", normed(state, "visual.ln_pre", x, 1e-5), heads, act, 0.0)
    pooled = normed(state, "visual.ln_post", x[:, 0], 1e-5) @ state["visual.proj"].double()
    return pooled / pooled.norm(dim=-1, keepdim=True)


def clip_text(state: State, ids: Tensor, heads: int, act: Activation) -> Tensor:
    """Unit embeddings (B, E) of token ids (B, S), taken at the largest id, which is the end of the text."""
    S = ids.shape[1]
    x = state["token_embedding.weight"].double()[ids] + state["positional_embedding"].double()[:S]
    causal = torch.full((S, S), -torch.inf, dtype=torch.float64).triu(1)
    x = normed(state, "ln_final", clip_tower(state, "", x, heads, act, causal), 1e-5)
    pooled = x[torch.arange(len(ids)), ids.argmax(-1)] @ state["text_projection"].double()
    return pooled / pooled.norm(dim=-1, keepdim=True)


def linear_head(state: State, x: Tensor) -> Tensor:
    """Scores (B,) of features through the linear layers `layers.N`, in the order of N."""
    for number in sorted({int(name.split(".")[1]) for name in state}):
        x = affine(state, f"layers.{number}", x)
    return x.squeeze(-1)


# -- ImageReward --------------------------------------------------------------------------------------------------


def image_reward(state: State, pixels: Tensor, ids: Tensor, mask: Tensor, vision_heads: int, text_heads: int) -> Tensor:
    """Standardised scores (B,) of preprocessed pixels and padded tokens."""
    picture = blip_vision(state, pixels, vision_heads)
    text = blip_text(state, ids, mask, picture, text_heads)
    head = {name.removeprefix("mlp."): value for name, value in state.items() if name.startswith("mlp.")}
    return (linear_head(head, text[:, 0]) - 0.16717362830052426) / 1.0333394966054072


def blip_vision(state: State, pixels: Tensor, heads: int) -> Tensor:
    """The normalised tokens (B, P, W) of BLIP's vision encoder."""
    root = "blip.visual_encoder"
    kernel, offset = (state[f"{root}.patch_embed.proj.{kind}"].double() for kind in ("weight", "bias"))
    patches = functional.conv2d(pixels.double(), kernel, offset, stride=kernel.shape[-1]).flatten(2).transpose(1, 2)
    first = state[f"{root}.cls_token"].double().expand(len(pixels), 1, -1)
    x = torch.cat([first, patches], dim=1) + state[f"{root}.pos_embed"].double()
    for layer in layers(state, f"{root}.blocks"):
        q, k, v = affine(state, f"{layer}.attn.qkv", normed(state, f"{layer}.norm1", x, 1e-6)).chunk(3, dim=-1)
        x = x + affine(state, f"{layer}.attn.proj", attention(q, k, v, heads))
        h = functional.gelu(affine(state, f"{layer}.mlp.fc1", normed(state, f"{layer}.norm2", x, 1e-6)))
        x = x + affine(state, f"{layer}.mlp.fc2", h)
    return normed(state, f"{root}.norm", x, 1e-6)


def blip_text(state: State, ids: Tensor, mask: Tensor, picture: Tensor, heads: int) -> Tensor:
    """The states (B, S, W) of BLIP's text encoder, a BERT with cross-attention to the picture; `mask` hides padding."""
    root = "blip.text_encoder"
    words, places = (state[f"{root}.embeddings.{kind}_embeddings.weight"].double() for kind in ("word", "position"))
    x = normed(state, f"{root}.embeddings.LayerNorm", words[ids] + places[: ids.shape[1]], 1e-12)
    padding = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(mask == 0, -torch.inf)[:, None, None]
    for layer in layers(state, f"{root}.encoder.layer"):
        for part, source, bias in (("attention", None, padding), ("crossattention", picture, 0.0)):
            seen = x if source is None else source
            q = affine(state, f"{layer}.{part}.self.query", x)
            k, v = (affine(state, f"{layer}.{part}.self.{kind}", seen) for kind in ("key", "value"))
            h = affine(state, f"{layer}.{part}.output.dense", attention(q, k, v, heads, bias))
            x = normed(state, f"{layer}.{part}.output.LayerNorm", x + h, 1e-12)
        h = functional.gelu(affine(state, f"{layer}.intermediate.dense", x))
        x = normed(state, f"{layer}.output.LayerNorm", x + affine(state, f"{layer}.output.dense", h), 1e-12)
    return x


# -- random networks in the published layouts ---------------------------------------------------------------------


class Weights:
    """Draws random weights by name: matrices keep the scale of their input, norms and biases are far from 1 and 0."""

    def __init__(self, seed: int) -> None:
        self.generator, self.state = torch.Generator().manual_seed(seed), State()

    def draw(self, name: str, *shape: int, scale: float = 1.0, mean: float = 0.0) -> None:
        self.state[name] = mean + scale * torch.randn(shape, generator=self.generator)

    def linear(self, name: str, rows: int, columns: int) -> None:
        self.draw(f"{name}.weight", rows, columns, scale=columns**-0.5)
        self.draw(f"{name}.bias", rows, scale=0.2)

    def norm(self, name: str, width: int) -> None:
        self.draw(f"{name}.weight", width, scale=0.2, mean=1.0)
        self.draw(f"{name}.bias", width, scale=0.2)


def random_clip(
    seed: int, vocabulary: int, *, context: int, vision: int, text: int, embedding: int, size: int = 28, patch: int = 7
) -> State:
    """Weights of a CLIP with two layers in each tower, in OpenAI's layout; `vision` and `text` are widths."""
    w = Weights(seed)
    w.draw("visual.class_embedding", vision)
    w.draw("visual.positional_embedding", (size // patch) ** 2 + 1, vision, scale=0.5)
    w.draw("visual.conv1.weight", vision, 3, patch, patch, scale=(3 * patch * patch) ** -0.5)
    w.draw("visual.proj", vision, embedding, scale=vision**-0.5)
    w.draw("token_embedding.weight", vocabulary, text)
    w.draw("positional_embedding", context, text, scale=0.5)
    w.draw("text_projection", text, embedding, scale=text**-0.5)
    w.state["logit_scale"] = torch.tensor(3.0)
    for norm, width in (("visual.ln_pre", vision), ("visual.ln_post", vision), ("ln_final", text)):
        w.norm(norm, width)
    for prefix, width in (("visual.", vision), ("", text)):
        for number in range(2):
            layer = f"{prefix}transformer.resblocks.{number}"
            w.draw(f"{layer}.attn.in_proj_weight", 3 * width, width, scale=2 * width**-0.5)
            w.draw(f"{layer}.attn.in_proj_bias", 3 * width, scale=0.2)
            w.linear(f"{layer}.attn.out_proj", width, width)
            w.linear(f"{layer}.mlp.c_fc", 3 * width, width)
            w.linear(f"{layer}.mlp.c_proj", width, 3 * width)
            w.norm(f"{layer}.ln_1", width)
            w.norm(f"{layer}.ln_2", width)
    return w.state


def random_head(seed: int, width: int, prefix: str = "") -> State:
    """Weights of linear layers like LAION's and ImageReward's, but narrower."""
    w = Weights(seed)
    widths = (width, 12, 10, 8, 6, 1)
    for number, rows, columns in zip((0, 2, 4, 6, 7), widths[1:], widths, strict=False):
        w.linear(f"{prefix}layers.{number}", rows, columns)
    return w.state


def random_image_reward(seed: int, vocabulary: int, *, vision: int = 24, text: int = 16, size: int = 32) -> State:
    """Weights like ImageReward.pt with two layers in each tower and patches of 16 px.

    Pixels enter with a small scale, so that the epsilons of layer norms matter.
    """
    w, eye, ear = Weights(seed), "blip.visual_encoder", "blip.text_encoder"
    w.draw(f"{eye}.cls_token", 1, 1, vision, scale=0.01)
    w.draw(f"{eye}.pos_embed", 1, (size // 16) ** 2 + 1, vision, scale=0.005)
    w.draw(f"{eye}.patch_embed.proj.weight", vision, 3, 16, 16, scale=0.01 * 768**-0.5)
    w.draw(f"{eye}.patch_embed.proj.bias", vision, scale=0.002)
    w.norm(f"{eye}.norm", vision)
    for number in range(2):
        layer = f"{eye}.blocks.{number}"
        w.norm(f"{layer}.norm1", vision)
        w.norm(f"{layer}.norm2", vision)
        w.linear(f"{layer}.attn.qkv", 3 * vision, vision)
        w.linear(f"{layer}.attn.proj", vision, vision)
        w.linear(f"{layer}.mlp.fc1", 2 * vision, vision)
        w.linear(f"{layer}.mlp.fc2", vision, 2 * vision)
    w.draw(f"{ear}.embeddings.word_embeddings.weight", vocabulary, text)
    w.draw(f"{ear}.embeddings.position_embeddings.weight", 64, text, scale=0.5)
    w.state[f"{ear}.embeddings.position_ids"] = torch.arange(64)[None]
    w.norm(f"{ear}.embeddings.LayerNorm", text)
    for number in range(2):
        layer = f"{ear}.encoder.layer.{number}"
        for part, seen in (("attention", text), ("crossattention", vision)):
            w.linear(f"{layer}.{part}.self.query", text, text)
            w.linear(f"{layer}.{part}.self.key", text, seen)
            w.linear(f"{layer}.{part}.self.value", text, seen)
            w.linear(f"{layer}.{part}.output.dense", text, text)
            w.norm(f"{layer}.{part}.output.LayerNorm", text)
        w.linear(f"{layer}.intermediate.dense", 2 * text, text)
        w.linear(f"{layer}.output.dense", text, 2 * text)
        w.norm(f"{layer}.output.LayerNorm", text)
    w.linear("blip.vision_proj", 8, vision)
    w.linear("blip.text_proj", 8, text)
    w.state |= random_head(seed + 1, text, "mlp.")
    return w.state

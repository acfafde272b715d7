"""Training of the image-text scorer: a small CLIP model with a sigmoid loss over pairs.

The labels are known exactly: a caption matches every picture that it is true of.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig
from transformers.models.clip import CLIPImageProcessorPil

from dag.assets.build.clock import Clock
from dag.assets.build.data import Dataset
from dag.assets.build.judge import blurred, judge_loss, mixed_batch
from dag.assets.build.tokenizer import MAX_TOKENS
from dag.assets.build.truth import caption_matches, targets
from dag.evaluation.judge import Judge, Verdict

EMBEDDING = 96


@dataclass(frozen=True)
class ScorerSettings:
    """How the scorer is trained."""

    minutes: float = 9.0
    batch: int = 128
    learning_rate: float = 2e-3
    seed: int = 3


def text_config(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    """The config of the text encoder, the same in the scorer and in the text-to-image model."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        projection_dim=EMBEDDING,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def new_model(tokenizer: CLIPTokenizer) -> CLIPModel:
    """The scorer with random weights."""
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=64,
        patch_size=8,
        projection_dim=EMBEDDING,
    )
    model = CLIPModel(
        CLIPConfig(
            text_config=text_config(tokenizer).to_dict(),
            vision_config=vision.to_dict(),
            projection_dim=EMBEDDING,
        )
    )
    # With the default standard deviation of 0.02 the model takes long to tell words apart.
    nn.init.normal_(model.text_model.get_input_embeddings().weight, std=1.0)
    return model


def pair_loss(images: Tensor, texts: Tensor, matches: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Sigmoid cross-entropy summed over all pairs (picture, caption), divided by the number of pictures.

    Args:
        images, texts: (B, D) unit embeddings.
        matches:       (B, B) bool, whether the caption of column j is true of the picture of row i.
        scale, bias:   0-d, learnt; logits are exp(scale) cos + bias.
    """
    logits = scale.exp() * images @ texts.T + bias
    return functional.binary_cross_entropy_with_logits(logits, matches.float(), reduction="sum") / len(images)


def train(
    work: Path,
    out: Path,
    dataset: Dataset,
    reconstructions: np.ndarray,
    clock: Clock,
    settings: ScorerSettings = ScorerSettings(),
) -> None:
    """Train for a fixed time; fp32 weights go to `work`/scorer, the shipped fp16 ones to `out`/scorer."""
    torch.manual_seed(settings.seed)
    rng = np.random.default_rng(settings.seed)
    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
    model, truth = new_model(tokenizer), targets(dataset.scenes)
    ids = torch.tensor(
        tokenizer([scene.caption for scene in dataset.scenes], padding="max_length", max_length=MAX_TOKENS).input_ids
    )
    # A linear layer that predicts attributes helps the vision tower to learn faster; it is dropped afterwards.
    sizes = Judge().sizes
    attributes = nn.Linear(EMBEDDING, sum(sizes))
    scale, bias = nn.Parameter(torch.tensor(math.log(10.0))), nn.Parameter(torch.tensor(-10.0))
    parameters = [*model.parameters(), *attributes.parameters(), scale, bias]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=0.05)
    mean, std = torch.tensor(_processor().image_mean), torch.tensor(_processor().image_std)
    for step, progress in enumerate(clock.ticks(settings.minutes), start=1):
        for group in optimizer.param_groups:
            group["lr"] = (
                settings.learning_rate * min(1, step / 50) * max(0.02, 0.5 * (1 + math.cos(math.pi * progress)))
            )
        rows = rng.integers(0, dataset.training, settings.batch)
        pixels = blurred(mixed_batch(dataset, reconstructions, rows, rng), rng)
        pixels = (pixels - mean[:, None, None]) / std[:, None, None]
        with torch.autocast("cpu", torch.bfloat16):
            image = model.get_image_features(pixel_values=pixels).pooler_output
            text = model.get_text_features(input_ids=ids[rows]).pooler_output
        image, text = image.float(), text.float()
        unit_image, unit_text = functional.normalize(image, dim=-1), functional.normalize(text, dim=-1)
        matches = caption_matches([dataset.scenes[row] for row in rows])
        loss = pair_loss(unit_image, unit_text, matches, scale, bias)
        loss = loss + 0.5 * judge_loss(Verdict(*attributes(image).split(sizes, dim=1)), truth, torch.from_numpy(rows))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 100 == 0:
            print(f"scorer {step} loss {float(loss.detach()):.3f} {100 * progress:.0f} %", flush=True)
    model.eval().save_pretrained(work / "scorer")
    model.half().save_pretrained(out / "scorer")
    tokenizer.save_pretrained(out / "scorer")
    _processor().save_pretrained(out / "scorer")


def _processor() -> CLIPImageProcessorPil:
    side = {"height": 64, "width": 64}
    return CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size=side, image_mean=[0.5] * 3, image_std=[0.25] * 3)

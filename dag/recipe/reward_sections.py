"""The sections of a recipe that describe rewards: each reward's name and options. Imports no torch."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from dag.recipe.section import Section


class _Reward(Section):
    has_gradient: ClassVar[bool] = True
    """Whether gradients of the score reach the picture."""
    name: str
    weight: float = 1.0
    """Factor in the sum of rewards."""


class Compressibility(_Reward):
    has_gradient = False
    name: Literal["compressibility"]


class Incompressibility(_Reward):
    has_gradient = False
    name: Literal["incompressibility"]


class Colourfulness(_Reward):
    name: Literal["colourfulness"]


class Tower(_Reward):
    """A reward with a neural network."""

    path: str | None = None
    """Local file or folder, or hub id, of the weights; null takes the published ones from the hub. `random` is the published
    network with random weights, for benchmarks: it needs no download, does the same work, and its scores mean nothing."""
    tokenizer: str | None = None
    """Folder or hub id of the tokenizer; null looks beside the weights, then at the hub."""
    config: str | None = None
    """JSON file that describes the architecture; needed only for weights in their original layout of an unusual architecture."""
    dtype: Literal["fp32", "tf32", "bf16", "fp16"] = "fp32"
    """Precision of the network; heads and normalisation stay fp32. `tf32` is float32 with TF32 matrix products, which
    are faster on data-centre GPUs but not on RTX GPUs; with `fp32` too, previews of x0_hat take them. bf16 and fp16 take half
    the memory, and change the scores more."""
    max_batch: int = Field(16, ge=1)
    """Pictures per forward pass; memory grows with it, scores do not depend on it."""
    device: Literal["auto", "cpu"] = "auto"
    """Where the network runs: `auto` is the policy's device; `cpu` takes no GPU memory, but is slower."""
    offload: bool = False
    """Keep the network in CPU memory while the policy trains; costs two transfers of the network an epoch."""


class Aesthetic(Tower):
    name: Literal["aesthetic"]
    head: str | None = None
    """LAION's predictor, `sac+logos+ava1-l14-linearMSE.pth`; null takes TRL's copy from the hub."""


class ClipScore(Tower):
    name: Literal["clip_score"]
    scale: float = 1.0
    """Factor of the cosine: Hessel et al. take 2.5, torchmetrics takes 100."""
    clamp: bool = False
    """Negative cosines count as 0, as in Hessel et al. and torchmetrics; they then have no gradient."""
    prefix: str = ""
    """Text put before every prompt; Hessel et al. take `A photo depicts `."""


class ImageText(ClipScore):
    name: Literal["image_text"]  # type: ignore[assignment]
    path: str | None = "embedded"
    """`embedded` is the scorer that ships with this package; any CLIP model can be named instead."""
    scale: float = 100.0
    """Factor of the cosine."""


class PickScore(Tower):
    name: Literal["pickscore"]


class HPSv2(Tower):
    name: Literal["hpsv2"]
    version: Literal["v2.1", "v2.0"] = "v2.1"
    """Which published file is taken; it has no effect if `path` names a file."""


class ImageReward(Tower):
    name: Literal["image_reward"]


class Http(_Reward):
    """A reward in another process or on another machine: `python -m dag.rewards.serve`, or your own server."""

    has_gradient = False
    name: Literal["http"]
    url: str = Field(pattern=r"^https?://[^/\s]+(/\S*)?$")
    """The server gets POST {"images": [base64 PNG, ...], "prompts": [...]} and answers {"rewards": [...]}."""
    timeout: float = Field(60.0, gt=0)
    """Seconds to wait for one answer."""
    retries: int = Field(6, ge=0)
    """Further attempts after a failed one, after pauses of 1, 2, 4, ... at most 30 seconds: six last about a minute."""
    max_batch: int = Field(16, ge=1)
    """Pictures per request."""


class Custom(_Reward):
    has_gradient = False
    name: Literal["custom"]
    path: str = Field(pattern=r"^[^:]+:[A-Za-z_]\w*$")
    """`module:function` or `file.py:function`: (images (B,3,H,W) in [0,1], prompts) -> (B,) float32."""


RewardTerm = Annotated[
    Compressibility
    | Incompressibility
    | Colourfulness
    | ImageText
    | ClipScore
    | Aesthetic
    | ImageReward
    | HPSv2
    | PickScore
    | Http
    | Custom,
    Field(discriminator="name"),
]

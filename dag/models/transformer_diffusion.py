"""What the families with a transformer as their denoiser share."""

from typing import ClassVar

from torch import Tensor

from dag.errors import RunError
from dag.models import lora_file
from dag.models.latent_diffusion import LatentDiffusion
from dag.models.source import read_config


class TransformerDiffusion(LatentDiffusion):
    """A latent diffusion model whose denoiser is a transformer, with attention over the tokens of picture and prompt together."""

    component: ClassVar[str] = "transformer"
    targets: ClassVar[tuple[str, ...]] = (
        *LatentDiffusion.targets,
        *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    )
    has_channels_last: ClassVar[bool] = False

    def _check(self) -> None:
        config = read_config(self.folder, self.component)
        if config.get("_class_name", self.network.__name__) != self.network.__name__:
            raise RunError(
                f"model.path: {self.folder} holds a {config['_class_name']}, its model_index.json names a pipeline of "
                f"{self.network.__name__}"
            )

    def _for_other_programs(self, parts: dict[str, lora_file.Part]) -> dict[str, Tensor]:
        """The factors in diffusers' names with alpha folded in, as ComfyUI reads them for a transformer."""
        return lora_file.folded(parts[self.component].state, self.component, self.adapter.alpha / self.adapter.rank)

"""The recipe's section for trajectories that the present policy did not sample. Imports no torch."""

from pydantic import Field

from dag.recipe.section import Section


class Data(Section):
    """What an epoch trains on besides its rollout, or in its place; not for objectives that need the present policy's rollouts."""

    replay: int = Field(0, ge=0)
    """The last n rollouts are kept, and each is trained on once more in every epoch, after the new one, in as many updates. Their
    chains stay in memory (where `memory.chains` says) and are in every checkpoint."""
    folder: str | None = None
    """A folder of pictures with their prompts: one JSON object with `file_name` and `text` a line, in metadata.jsonl or
    captions.jsonl, as the folder of a search has it. An epoch trains on `train.trajectories` of them, noised by P_B."""
    sample: bool = False
    """With `folder`: also sample a rollout in each epoch, and train on it first. False samples for evaluations alone."""

    @property
    def samples(self) -> bool:
        """Whether an epoch samples a rollout."""
        return self.folder is None or self.sample

    @property
    def keys(self) -> list[str]:
        """The keys that bring trajectories of another policy into training."""
        return self.changed("replay", "folder")

    def problems(self) -> list[str]:
        """Mistakes within the section, in words."""
        if self.folder is None:
            return ["data.sample has no effect without data.folder"] if self.sample else []
        if self.replay and not self.sample:
            return ["data.replay keeps sampled rollouts, and with data.folder there are none; set data.sample=true"]
        return []

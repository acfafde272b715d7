"""Random input for all code that reads from outside: recipes, checkpoints, requests. It must be refused, never crash."""

import base64
import io
import json
import shutil
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import yaml
from hypothesis import strategies as st
from PIL import Image

from dag.errors import RunError, UsageError
from dag.recipe.load import flat, load
from dag.rewards.serve import RewardServer
from dag.run import checkpoint
from dag.run.checkpoint import Position
from dag.training import plan

RECIPES = sorted(
    path for path in (Path(__file__).parents[2] / "recipes").rglob("*.yaml") if path.parent.name != "search"
)
# How many tries had which result.
SEEN: Counter[str] = Counter()

# -- recipes ------------------------------------------------------------------------------------------------------

_LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["embedded", "none", "dag_kl", "ddpo", "one_pass", "1e-4", "../../etc/passwd", "colourfulness"])
    | st.dates()
    | st.binary(max_size=8)
)
_TREES = st.recursive(
    _LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
)
_KNOWN = sorted({key for file in RECIPES for key in flat(yaml.safe_load(file.read_text(encoding="utf-8")))})
_KEYS = st.sampled_from(_KNOWN) | st.text(max_size=12) | st.builds(".".join, st.lists(st.text(max_size=6), max_size=4))
OVERRIDES = st.lists(
    st.builds(lambda key, value: f"{key}={json.dumps(value, default=str)}", _KEYS, _TREES)
    | st.builds("{}={}".format, _KEYS, st.text(max_size=30))
    | st.text(max_size=30),
    max_size=3,
)
RECIPE_BYTES = (
    st.binary(max_size=200)
    | st.text(alphabet="abc:{}[]-# &*!|>'\"%@\n\t0.\\", max_size=80).map(str.encode)
    | st.builds(lambda tree: yaml.safe_dump(tree).encode(), _TREES)
    | st.sampled_from(RECIPES).map(Path.read_bytes)
)


def try_recipe(content: bytes, overrides: list[str], folder: Path) -> None:
    """Load a recipe and plan it. If it is refused, every line of the message must name the file or the override."""
    file = folder / "recipe.yaml"
    file.write_bytes(content)
    try:
        recipe = load(file, overrides)
    except UsageError as error:
        if not all(line.startswith((str(file), "--set ")) for line in str(error).splitlines()):
            raise AssertionError(f"a line names neither file nor override: {error}") from error
        SEEN["recipes refused"] += 1
        return
    with suppress(UsageError):  # the model's folder may be missing
        plan.describe(recipe, 3)
    SEEN["recipes loaded"] += 1


# -- checkpoints --------------------------------------------------------------------------------------------------

DAMAGE = st.tuples(
    st.sampled_from(["cut", "flip", "empty", "remove", "replace", "manifest", "extra", "folder"]),
    st.integers(0, 10**6),
    st.binary(min_size=1, max_size=40),
    _TREES,
)


def write_checkpoints(folder: Path) -> None:
    """Write two small complete checkpoints."""
    for epoch in (1, 2):
        groups = {"policy": {"a": torch.full((40,), float(epoch))}, "learner": {}}
        state: dict[str, Any] = {"epoch": epoch, "flight": [], "fingerprint": {}}
        checkpoint.save(folder, Position(epoch), groups, state, keep=2, texts={"metrics.jsonl": "{}\n"})


def damage(folder: Path, kind: str, where: int, junk: bytes, tree: Any) -> None:
    """Damage the newer of two checkpoints."""
    newer = folder / "epoch_0002"
    files = sorted(newer.iterdir())
    file = files[where % len(files)]
    content = file.read_bytes()
    at = where % max(1, len(content))
    if kind == "cut":
        file.write_bytes(content[:at])
    elif kind == "flip":
        file.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    elif kind == "empty":
        file.write_bytes(b"")
    elif kind == "remove":
        file.unlink()
    elif kind == "replace":
        file.write_bytes(junk)
    elif kind == "manifest":
        manifest = json.loads((newer / checkpoint.MANIFEST).read_text())
        key = ["format", "files", f"files/{file.name}", "files/../../escape"][where % 4].split("/", 1)
        (manifest if len(key) == 1 else manifest[key[0]])[key[-1]] = json.loads(json.dumps(tree, default=str))
        (newer / checkpoint.MANIFEST).write_text(json.dumps(manifest))
    elif kind == "extra":
        (folder / f"epoch_{where}").mkdir(exist_ok=True)
        (folder / "epoch_12x").mkdir()
        (folder / ".tmp-epoch_0003").mkdir()
    else:
        shutil.rmtree(newer)
        newer.write_bytes(junk)


def try_checkpoint(damaged: tuple[str, int, bytes, Any], folder: Path) -> None:
    """Damage the newer of two checkpoints: the newest complete one must be taken, and must be readable."""
    shutil.rmtree(folder, ignore_errors=True)
    write_checkpoints(folder)
    damage(folder, *damaged)
    try:
        found, skipped = checkpoint.newest(folder, lambda state: None)
    except RunError:
        raise AssertionError("the older checkpoint is complete") from None
    assert found is not None
    assert checkpoint.load_state(found)["epoch"] == Position.of(found).epoch  # type: ignore[union-attr]
    assert checkpoint.load_tensors(found, "policy")["a"].isfinite().all()
    SEEN["checkpoints skipped" if skipped else "checkpoints taken"] += 1


# -- requests -----------------------------------------------------------------------------------------------------


def _png(width: int, height: int, mode: str) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


_PNGS = st.builds(_png, st.integers(1, 40), st.integers(1, 40), st.sampled_from(["RGB", "RGBA", "L", "1", "P", "I;16"]))
_DAMAGED_PNGS = st.builds(
    lambda png, at, junk: png[: at % len(png)] + junk + png[at % len(png) + len(junk) :],
    _PNGS,
    st.integers(0, 10**4),
    st.binary(max_size=12),
)
_IMAGES = (_PNGS | _DAMAGED_PNGS).map(lambda png: base64.b64encode(png).decode()) | st.text(max_size=30)
REQUESTS = (
    st.binary(max_size=100)
    | st.builds(lambda tree: json.dumps(tree, default=str).encode(), _TREES)
    | st.builds(
        lambda images, prompts: json.dumps({"images": images, "prompts": prompts}).encode(),
        st.lists(_IMAGES, max_size=4),
        st.lists(st.text(max_size=10), max_size=4),
    )
    | st.builds(
        lambda image: json.dumps({"images": [image], "prompts": ["a cat"]}).encode(),
        _IMAGES,
    )
)


def try_request(body: bytes, server: RewardServer) -> None:
    """Send a request: the answer must be one finite number for each picture, or an error status with a reason."""
    status, answer = server.answer(body)
    json.dumps(answer, allow_nan=False)
    assert status in (200, 400, 500)
    assert ("rewards" in answer) == (status == 200)
    SEEN[f"requests answered {status}"] += 1

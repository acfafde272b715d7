"""Rebuild everything in dag/assets.

    python -m dag.assets.build --work DIR --out DIR [--stage NAME ...] [--speed X]

Needs, beside this package: `pip install resvg-py==0.5.0`, and the drawings, in the work folder:

    npm install --prefix DIR/npm @iconify-json/fluent-emoji-flat@1.2.6 @iconify-json/noto@1.2.9 \
        @lobehub/fluent-emoji-3d@1.1.0 emojibase-data@17.0.0

Stages, in order; each leaves files in the work folder, so that one can be repeated alone:

    data      62,000 captioned scenes with their truth, and the tokenizer
    vae       the autoencoder, and reconstructions that judge and scorer also train on
    judge     the classifier that measures prompt fidelity
    scorer    the CLIP model that scores pictures against prompts
    denoiser  text encoder and UNet: the text-to-image model
    continue  the denoiser again, from the weights in the out folder
    tiny_vae  the decoder for previews; again after each run of denoiser or continue, which replace its folder
    measure   fidelity table and sample picture
    flow      the flow-matching model, distilled from the model in the out folder; needs no drawings
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from dag.assets.build import data, denoiser, flow, judge, measure, scorer, tiny_vae, tokenizer, vae
from dag.assets.build.clock import Clock

_RECONSTRUCTED = 16_000


def _data(work: Path, out: Path, clock: Clock) -> None:
    data.build(work)
    tokenizer.build([scene.caption for scene in data.load(work).scenes], work / "tokenizer")


def _vae(work: Path, out: Path, clock: Clock) -> None:
    vae.train(work, data.load(work))


def _reconstructions(work: Path) -> np.ndarray:
    """The first training pictures after encoding and decoding, (n, 64, 64, 3) uint8; computed once and stored in `work`."""
    path = work / "reconstructions.npy"
    if not path.exists():
        model = vae.AutoencoderKL.from_pretrained(work / "vae").eval()
        images = vae.reconstruct(model, data.load(work).pictures[:_RECONSTRUCTED])
        np.save(path, (images * 255).round().byte().permute(0, 2, 3, 1).numpy())
    return np.load(path, mmap_mode="r")


def _judge(work: Path, out: Path, clock: Clock) -> None:
    judge.train(work, out, data.load(work), _reconstructions(work), clock)


def _scorer(work: Path, out: Path, clock: Clock) -> None:
    scorer.train(work, out, data.load(work), _reconstructions(work), clock)


def _denoiser(work: Path, out: Path, clock: Clock) -> None:
    denoiser.train(work, out, data.load(work), clock)


def _continue(work: Path, out: Path, clock: Clock) -> None:
    denoiser.train(work, out, data.load(work), clock, from_shipped=True)


def _tiny_vae(work: Path, out: Path, clock: Clock) -> None:
    tiny_vae.train(work, out, data.load(work))


def _measure(work: Path, out: Path, clock: Clock) -> None:
    measure.report(work, out, data.load(work))


def _flow(work: Path, out: Path, clock: Clock) -> None:
    flow.train(out)


STAGES: dict[str, Callable[[Path, Path, Clock], None]] = {
    "data": _data,
    "vae": _vae,
    "judge": _judge,
    "scorer": _scorer,
    "denoiser": _denoiser,
    "continue": _continue,
    "tiny_vae": _tiny_vae,
    "measure": _measure,
    "flow": _flow,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m dag.assets.build", description="Draw the data of the embedded model and train its networks."
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for the drawings, data and checkpoints")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder that gets embedded/, scorer/, judge/, samples.png"
    )
    parser.add_argument(
        "--stage",
        nargs="+",
        choices=list(STAGES),
        default=[name for name in STAGES if name not in ("continue", "flow")],
    )
    parser.add_argument("--speed", type=float, default=1.0, help="divide every time budget by this, for trials")
    arguments = parser.parse_args()
    packages = arguments.work / "npm/node_modules"
    if arguments.stage != ["flow"] and not packages.is_dir():
        parser.error(f"{packages} is missing; the first lines of dag/assets/build/__main__.py say what to install")
    for stage in arguments.stage:
        start = time.monotonic()
        STAGES[stage](arguments.work, arguments.out, Clock(arguments.speed))
        print(f"{stage}: {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()

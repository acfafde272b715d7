"""Compares Vendi score, Frechet and kernel distance with published implementations, on one run's pictures.

pip install vendi-score torchmetrics scipy
python tests/by_hand/published_statistics.py RUN
"""

import sys
from pathlib import Path

import numpy as np
import torch


def main(run: Path) -> None:
    import scipy.linalg
    from torchmetrics.image.fid import _compute_fid
    from torchmetrics.image.kid import poly_mmd
    from vendi_score import vendi

    from dag.evaluation.compare import evaluate
    from dag.evaluation.distances import frechet_distance, kernel_distance, vendi_score
    from dag.rewards.clip import feature_tower

    _, drawn = evaluate([run], torch.device("cpu"))
    tower = feature_tower("features", "embedded")
    base, _, trained = (tower.embed_images(images).double() for images in drawn.values())
    c_base, c_trained = (np.cov(x.numpy(), rowvar=False) for x in (base, trained))
    root = scipy.linalg.sqrtm(c_base @ c_trained + 0j).real
    shift = float((base.mean(0) - trained.mean(0)).square().sum())
    by_scipy = shift + float(np.trace(c_base + c_trained - 2 * root))
    by_torchmetrics = float(_compute_fid(base.mean(0), torch.cov(base.T), trained.mean(0), torch.cov(trained.T)))
    rows = [
        ("vendi, vendi_score", vendi_score(base), float(vendi.score_X(base.numpy()))),
        ("frechet, torchmetrics", frechet_distance(base, trained), by_torchmetrics),
        ("frechet, scipy", frechet_distance(base, trained), by_scipy),
        ("kernel, torchmetrics", kernel_distance(base, trained), float(poly_mmd(base, trained))),
    ]
    for name, ours, theirs in rows:
        print(f"{name:22} {ours:.12g} {theirs:.12g} difference {abs(ours - theirs):.1e}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Do self-supervised features know where things are? A ridge probe of landmark positions on frozen feature maps.

Each method pre-trains an encoder on the data set's unlabelled images; the deepest feature maps of at least 4x4, pooled
to 4x4, then predict landmark positions by ridge regression from a few training images, and are scored on test images.
The untrained encoder is the one that pre-training started from. Positions are in pixels of the network's input.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.config.config import Config
from core.config.load import add_config_arguments, load_config
from core.config.starts import SSL_METHODS
from core.data.dataset import ImageSet, load_images
from core.data.shots import select_shots
from core.data.source import load_source
from core.errors import CommandParser, run_command
from core.files import write_json
from core.networks.encoders import build_encoder, read_encoder
from core.runs.places import encoder_path
from core.runs.record import environment
from ssl_baselines.collapse import effective_rank
from ssl_baselines.train import pretrain_encoder

GRID = 4
ALPHAS = np.logspace(-3, 5, 33)
BATCH = 50


def settle_normalisation(encoder: nn.Module, images: Tensor) -> None:
    """Take batch normalisation's statistics from whole images, for trained and untrained encoders alike."""
    for layer in encoder.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.reset_running_stats()
            layer.momentum = None  # a plain mean over batches
    encoder.train()
    with torch.no_grad():
        for batch in images.split(BATCH):
            encoder(batch)
    encoder.eval()


def pooled_maps(encoder: nn.Module, images: Tensor) -> tuple[np.ndarray, Tensor]:
    """(M, 1, H, W) -> (M, C * 16) of the deepest maps of at least 4x4, and (M, width) means of the deepest maps."""
    maps, means = [], []
    with torch.no_grad():
        for batch in images.split(BATCH):
            features = encoder(batch)
            deepest = [level for level in features if min(level.shape[2:]) >= GRID][-1]
            maps.append(F.adaptive_avg_pool2d(deepest, GRID).flatten(1))
            means.append(features[-1].mean(dim=(2, 3)))
    return torch.cat(maps).double().numpy(), torch.cat(means)


def ridge_predict(train: np.ndarray, targets: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Ridge regression on standardised features (M, P), its strength by leave-one-out error; (T, P) -> (T, K)."""
    mean, scale = train.mean(axis=0), train.std(axis=0)
    scale[scale < 1e-12] = np.inf  # a feature that never changes says nothing
    train, test = (train - mean) / scale, (test - mean) / scale
    values, vectors = np.linalg.eigh(train @ train.T)
    centre = targets.mean(axis=0)
    rotated = vectors.T @ (targets - centre)
    errors = []
    for alpha in ALPHAS:
        shrunk = values / (values + alpha)
        diagonal = (vectors**2 * shrunk).sum(axis=1) + 1 / len(train)  # of the hat matrix, the mean included
        left_out = (targets - centre - vectors @ (shrunk[:, None] * rotated)) / (1 - diagonal)[:, None]
        errors.append((left_out**2).mean())
    best = ALPHAS[int(np.argmin(errors))]
    return test @ (train.T @ (vectors @ (rotated / (values + best)[:, None]))) + centre


def probe(encoder: nn.Module, unlabelled: ImageSet, train: ImageSet, test: ImageSet) -> dict[str, float]:
    """Mean radial error of the probe in network pixels, and the effective rank of the test images' embeddings."""
    settle_normalisation(encoder, unlabelled.images)
    features, _ = pooled_maps(encoder, train.images)
    features_of_test, embeddings = pooled_maps(encoder, test.images)
    predicted = ridge_predict(features, train.truth.flatten(1).numpy(), features_of_test)
    errors = np.linalg.norm(predicted.reshape(test.truth.shape) - test.truth.numpy(), axis=2)
    return {"error_px": float(errors.mean()), "effective_rank": effective_rank(embeddings)}


def run_seed(config: Config, seed: int, labelled: int, methods: list[str]) -> list[dict]:
    """Probe the untrained encoder and each method's, all of the same start, on the same images."""
    source = load_source(config.dataset)
    chosen = select_shots(source.require("train"), labelled, seed, "random")
    unlabelled, train, test = (load_images(records, config.dataset) for records in
                               (source.pretraining_records(), chosen, source.require("test")))
    guess = np.linalg.norm((test.truth - train.truth.mean(dim=0)).numpy(), axis=2).mean()
    rows = [{"method": "mean shape", "error_px": float(guess)}]
    torch.manual_seed(seed)
    start = build_encoder(config.finetune.encoder, 1)
    rows.append({"method": "untrained", **probe(start, unlabelled, train, test)})
    for method in methods:
        pretrain_encoder(config, method)
        encoder = build_encoder(config.finetune.encoder, 1)
        path = encoder_path(config, method)
        encoder.load_state_dict(read_encoder(path, config.finetune.encoder))
        lines = [json.loads(line) for line in (path.parent / "metrics.jsonl").read_text(encoding="utf8").splitlines()]
        last = next(line for line in reversed(lines) if "validation_loss" in line)
        rows.append({"method": path.parent.name, **probe(encoder, unlabelled, train, test),
                     **{key: value for key, value in last.items() if key.startswith("teacher_")}})
    return [{"seed": seed, **row} for row in rows]


def print_table(rows: list[dict]) -> None:
    """Mean over seeds and, for the error, its difference from the untrained encoder's seed by seed."""
    untrained = {row["seed"]: row["error_px"] for row in rows if row["method"] == "untrained"}
    print("| encoder | error, px | minus untrained, by seed | effective rank | teacher entropy, information |")
    print("|---|---|---|---|---|")
    for method in dict.fromkeys(row["method"] for row in rows):
        of = [row for row in rows if row["method"] == method]
        error = np.mean([row["error_px"] for row in of])
        gains = [row["error_px"] - untrained[row["seed"]] for row in of]
        ranks, teacher = ([row[key] for row in of if key in row] for key in ("effective_rank", "teacher_entropy"))
        information = [row["teacher_information"] for row in of if "teacher_information" in row]
        print(f"| {method} | {error:.2f} | {' '.join(f'{gain:+.2f}' for gain in gains)} | "
              f"{f'{np.mean(ranks):.1f}' if ranks else ''} | "
              f"{f'{np.mean(teacher):.3f}, {np.mean(information):.3f}' if teacher else ''} |")


def main() -> None:
    """Command line."""
    parser = CommandParser(
        prog="python -m benchmarks.probe", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python -m benchmarks.probe --set ssl.iterations=200 ssl.batch_size=32 --out probe")
    add_config_arguments(parser)
    parser.add_argument("--methods", nargs="+", choices=SSL_METHODS, default=list(SSL_METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--labelled", type=int, default=50, help="training images of the probe")
    parser.add_argument("--out", type=Path, default=Path("runs/probe"))
    arguments = parser.parse_args()
    rows = []
    for seed in arguments.seeds:
        place = [f"experiment.output_dir={arguments.out}", f"experiment.name=seed{seed}", f"experiment.seed={seed}"]
        config = load_config(arguments.config, [*arguments.set, *place], arguments.methods)
        rows += run_seed(config, seed, arguments.labelled, arguments.methods)
    write_json(arguments.out / f"probe_{config.ssl.preset}.json", {"environment": environment(), "rows": rows})
    print_table(rows)


if __name__ == "__main__":
    run_command(main)

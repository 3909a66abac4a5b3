"""Landmarks of a few labelled images found in others by what the pre-trained U-Net sees there; no detector is trained.

Every landmark is described by the decoder's activations at its place (Tang et al. 2023), whitened over all places of
many images, and looked for in the other images by cosine similarity on every level of the decoder, which the labelled
shapes' mean holds together. What was found describes the landmark in its turn and is looked for once more. A match is
certain where its map is peaked, and where nothing in the labelled image is more like it than the landmark itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from core.config.config import Config
from core.data.dataset import ImageSet
from core.errors import UserError
from core.formats.geometry import apply_maps, inverse
from core.runs.places import pretrained_path
from landmarks_finetuning.decoding import sigma_pixels
from landmarks_finetuning.features import Batch, FeatureNetwork
from landmarks_finetuning.heatmaps import confidence, find_points, log_maps
from landmarks_finetuning.shape import Shape, add_shape_prior

NOISE_LEVELS = (0.2, 0.5, 0.8)  # timesteps that the network is told, of those of the pre-training
TEMPERATURE = 0.0125  # of the mean cosine similarity, in the softmax over pixels
SPREADS = (0.1, 0.1, 0.07)  # of the shape prior, one decoding after the other, of the shape's size
ROUNDS = 2  # searches: with the labelled descriptions, then with those found as well
OWN_SHARE = 0.5  # of the labelled description in that of the second search
SHRINKAGE = 0.01  # of the mean variance, added to every variance before whitening
WHITENED = 64  # images of which the whitening is computed at most
CHECKED = 4  # labelled images in which a match is looked for in return at most
BACK_SIGMAS = 2.0  # how far from the landmark, in heatmap sigmas, its match in return may lie (standard deviation)
DECODER, LOSS = "local_expectation", "cross_entropy_pixels"

Maps = list[Tensor]  # a tensor (B, C, *size of its level) for each place in the decoder
Vectors = list[Tensor]  # a tensor (N, C) or (B, N, C) for each


class Matches(NamedTuple):
    """Points (M, N, D) in stored pixels and certainties (M, N) in [0, 1]; NaN and 0 of landmarks that no label has."""

    points: np.ndarray
    certainty: np.ndarray


def match_landmarks(config: Config, labelled: ImageSet, others: ImageSet) -> tuple[np.ndarray, np.ndarray]:
    """Points (M, N, D) in stored pixels and certainties (M, N) in [0, 1] of the `labelled` landmarks in `others`.

    NaN and 0 for landmarks that no label has. UserError where the pre-training's weights (core.runs.places
    .pretrained_path) are not there or are of another network.
    """
    return matches(config, labelled, others, SPREADS)


def matches(config: Config, labelled: ImageSet, others: ImageSet, spreads: Sequence[float]) -> Matches:
    """`match_landmarks` with other `spreads` of the shape prior; none of them: each landmark by itself."""
    path = pretrained_path(config)
    if not path.is_file():
        raise UserError(f"matching needs the pre-trained weights {path}, which do not exist; run the stage pretrain "
                        "first, or set finetune.checkpoint")
    network = FeatureNetwork(config, path, labelled.images.shape[1])
    seer = Describer(network, labelled, others)
    own = seer.describe(labelled)
    matcher = Matcher(seer, own, Shape.of(labelled.truth.cpu().numpy(), config.finetune.augmentation), spreads,
                      sigma_pixels(config.finetune.sigma, config.dataset), labelled)
    found, wanted = matcher.search(others, own)
    for _ in range(ROUNDS - 1):
        mixed = [F.normalize(OWN_SHARE * mine + (1 - OWN_SHARE) * theirs, dim=-1)
                 for mine, theirs in zip(own, wanted, strict=True)]
        found, wanted = matcher.search(others, mixed)
    unknown = ~np.isfinite(labelled.original_points()).all(axis=2).any(axis=0)
    found.points[:, unknown], found.certainty[:, unknown] = np.nan, 0.0
    return found


class Describer:
    """Whitened features of unit length at every place of the decoder."""

    def __init__(self, network: FeatureNetwork, *sets: ImageSet) -> None:
        self.network = network
        self.places = range(len(network.model.ups) + 1)
        share = max(1, sum(len(images.records) for images in sets) // WHITENED)
        self.whitening: list[tuple[Tensor, Tensor]] = whitening(
            maps for images in sets for number, batch in enumerate(network.batches(images))
            if number % share == 0 for maps in (self._raw(batch),))

    def _raw(self, batch: Batch) -> Maps:
        return self.network.maps(batch.images, self.places, NOISE_LEVELS)

    def maps(self, batch: Batch) -> Maps:
        """(B, C, *size of its level) for each place, of unit length along C."""
        return [F.normalize(torch.einsum("bc...,cd->bd...", raw - mean.view(-1, *(1,) * (raw.ndim - 2)), turn), dim=1)
                for raw, (mean, turn) in zip(self._raw(batch), self.whitening, strict=True)]

    def describe(self, images: ImageSet) -> Vectors:
        """(N, C) for each place: the mean description of every landmark over the images that have it, unit length."""
        totals: Vectors = []
        for batch in self.network.batches(images):
            points = apply_maps(np.stack([images.records[index].truth for index in batch.chosen]), batch.maps)
            present = torch.from_numpy(np.isfinite(points).all(axis=2)).to(self.network.device)
            parts = [(vectors * present[..., None]).sum(dim=0)
                     for vectors in sampled(self.maps(batch), points, batch.images.shape[2:])]
            totals = [total + part for total, part in zip(totals, parts, strict=True)] if totals else parts
        return [F.normalize(total, dim=-1) for total in totals]


def whitening(batches: Iterator[Maps]) -> list[tuple[Tensor, Tensor]]:
    """For each place the mean (C,) of the features and the matrix (C, C) that makes them uncorrelated (PCA)."""
    sums: list[list[Tensor]] = []
    for maps in batches:
        rows = [raw.flatten(2).transpose(1, 2).flatten(0, 1).double() for raw in maps]
        parts = [[row.new_tensor(len(row)), row.sum(dim=0), row.T @ row] for row in rows]
        sums = [[a + b for a, b in zip(*two, strict=True)] for two in zip(sums, parts, strict=True)] if sums else parts
    matrices = []
    for count, total, products in sums:
        mean = total / count
        values, vectors = torch.linalg.eigh(products / count - torch.outer(mean, mean))
        spread = (values.clamp(min=0) + SHRINKAGE * values.mean() + 1e-12).sqrt()
        matrices.append((mean.float(), (vectors / spread).float()))
    return matrices


def sampled(maps: Maps, points: np.ndarray, size: Sequence[int]) -> Vectors:
    """Features (B, N, C) of unit length for each place at `points` (B, N, D), in pixels of an image of `size`.

    Linear between the level's pixels; NaN points get some value.
    """
    last_first = torch.from_numpy(np.nan_to_num(points)).flip(-1)  # grid_sample counts x first
    place = (2 * last_first + 1) / torch.tensor(tuple(reversed(size))) - 1  # pixel centres -> -1 to 1 at the edges
    vectors = []
    for level in maps:
        grid = place.to(level).view(len(place), -1, *(1,) * (level.ndim - 3), level.ndim - 2)
        values = F.grid_sample(level, grid, padding_mode="border", align_corners=False)
        vectors.append(F.normalize(values.flatten(2).transpose(1, 2), dim=-1))
    return vectors


def similarity(maps: Maps, vectors: Vectors, size: Sequence[int]) -> Tensor:
    """(B, N, *size): mean cosine similarity of `vectors` (N, C) or (B, N, C) with the maps, every resolution alike."""
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(size)]
    resolutions = [tuple(level.shape[2:]) for level in maps]
    total: Tensor | float = 0.0
    for level, wanted in zip(maps, vectors, strict=True):
        alike = torch.einsum("bnc,bc...->bn...", wanted.expand(len(level), *wanted.shape[-2:]), level)
        shared = resolutions.count(tuple(level.shape[2:])) * len(set(resolutions))
        total = total + F.interpolate(alike, size=tuple(size), mode=mode, align_corners=False) / shared
    assert isinstance(total, Tensor)
    return total


class Matcher:
    """The search for landmarks of `shape`, which the labelled images give, in network pixels."""

    def __init__(self, seer: Describer, own: Vectors, shape: Shape, spreads: Sequence[float], sigma: float,
                 labelled: ImageSet) -> None:
        self.seer, self.own, self.shape, self.spreads, self.sigma = seer, own, shape, spreads, sigma
        self.labels = self._labels(labelled)

    def _labels(self, labelled: ImageSet) -> list[tuple[Maps, np.ndarray, Sequence[int]]]:
        """Maps, points (N, D) and size of the labelled images in which matches are looked for in return."""
        labels: list[tuple[Maps, np.ndarray, Sequence[int]]] = []
        for batch in self.seer.network.batches(labelled):
            maps, truth = self.seer.maps(batch), [labelled.records[index].truth for index in batch.chosen]
            points = apply_maps(np.stack(truth), batch.maps)
            labels += [([level[[row]] for level in maps], points[row], batch.images.shape[2:])
                       for row in range(min(len(points), CHECKED - len(labels)))]
            if len(labels) == CHECKED:
                break
        return labels

    def search(self, others: ImageSet, wanted: Vectors) -> tuple[Matches, Vectors]:
        """Matches of the descriptions `wanted` in `others`, and what was found described: the mean by certainty."""
        points, certainty = np.zeros((2, len(others.records), *self.shape.mean.shape))
        certainty = certainty[..., 0]
        totals: Vectors = [torch.zeros_like(vectors) for vectors in wanted]
        for batch in self.seer.network.batches(others):
            maps, size = self.seer.maps(batch), batch.images.shape[2:]
            found, sure = self.locate(similarity(maps, wanted, size) / TEMPERATURE)
            vectors = sampled(maps, found, size)
            sure = sure * self.agreement(vectors)
            points[batch.chosen], certainty[batch.chosen] = apply_maps(found, inverse(batch.maps)), sure
            weights = torch.from_numpy(sure).to(vectors[0])[..., None]
            totals = [total + (weights * some).sum(dim=0) for total, some in zip(totals, vectors, strict=True)]
        return Matches(points, certainty), [F.normalize(total, dim=-1) for total in totals]

    def locate(self, scores: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Points (B, N, D) and how peaked each map is about them (B, N), from scores (B, N, *size)."""
        seen = log_maps(scores, LOSS)
        points = find_points(scores, seen, DECODER, LOSS, self.sigma)
        for spread in self.spreads:
            fitted = self.shape.fit(points.cpu().numpy(), np.ones(points.shape[:2]))
            weighted = add_shape_prior(scores, fitted, spread * self.shape.size)
            points = find_points(weighted, seen._replace(scores=weighted), DECODER, LOSS, self.sigma)
        return points.cpu().numpy(), confidence(seen, points, LOSS, self.sigma).cpu().numpy()

    def agreement(self, vectors: Vectors) -> np.ndarray:
        """(B, N) in [0, 1]: how near the labelled landmark lies to what there is most like the match (B, N, C)."""
        total, count = np.zeros(vectors[0].shape[:2]), np.zeros(vectors[0].shape[1])
        for maps, truth, size in self.labels:
            alike = similarity([level.expand(len(vectors[0]), *level.shape[1:]) for level in maps], vectors, size)
            back = torch.stack(torch.unravel_index(alike.flatten(2).argmax(dim=2), tuple(size)), dim=-1).cpu().numpy()
            off = np.linalg.norm(back - truth, axis=2) / (BACK_SIGMAS * self.sigma)
            total += np.nan_to_num(np.exp(-(off**2) / 2))
            count += np.isfinite(truth).all(axis=1)
        return total / np.maximum(count, 1)

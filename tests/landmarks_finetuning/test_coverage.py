"""Which images to label: facility location against brute force, the recorded order, and the command that suggests."""

import csv
import json
from itertools import combinations

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.spatial.distance import cdist

from core.config.load import load_config
from core.data.shots import labelled_subset, select_shots
from core.data.source import load_source
from landmarks_finetuning import coverage
from landmarks_finetuning.coverage import FILE, coverage_order, distances, facility_location, pooled, thinned
from tests.conftest import error_of

SUGGEST = "landmarks_finetuning.suggest"


def points(seed, count=8):
    return np.random.default_rng(seed).normal(size=(count, 3))


def cost(apart, chosen, nearest=np.inf):
    """Mean distance to the nearest of `chosen`."""
    return np.minimum(apart[:, list(chosen)].min(axis=1), nearest).mean()


@pytest.mark.parametrize("seed", range(5))
def test_each_image_is_the_best_that_can_be_added(seed):
    """Among all of 8 points, by trying them; the first is the medoid."""
    apart = cdist(points(seed), points(seed))
    chosen = facility_location(apart, 8)
    assert sorted(chosen) == list(range(8)) and chosen[:3] == facility_location(apart, 3)
    for count in range(1, 8):
        best = min(cost(apart, [*chosen[: count - 1], other]) for other in range(8))
        assert cost(apart, chosen[:count]) == pytest.approx(best)
    optimum = min(cost(apart, some) for some in combinations(range(8), 3))
    assert cost(apart, chosen[:3]) <= 1.3 * optimum


def test_three_groups_have_three_images():
    centres = np.array([[0, 0], [10, 0], [0, 10]])
    groups = np.concatenate([centre + 0.1 * points(1, 4)[:, :2] for centre in centres])
    chosen = facility_location(distances(groups, groups), 3)
    assert sorted(index // 4 for index in chosen) == [0, 1, 2]
    optimum = min(cost(cdist(groups, groups), some) for some in combinations(range(12), 3))
    assert cost(cdist(groups, groups), chosen) <= 1.1 * optimum  # greedy: near it


def test_what_is_labelled_counts_as_chosen():
    line = np.array([[0.0], [1], [2], [10], [11], [12]])
    apart = cdist(line, line[3:])  # candidates 10, 11 and 12; 1 is labelled
    assert facility_location(apart, 1, nearest=np.abs(line[:, 0] - 1)) == [1]
    assert facility_location(cdist(line, line), 2, nearest=np.abs(line[:, 0] - 1))[0] == 4
    with pytest.raises(ValueError, match="4 of 3"):
        facility_location(apart, 4)


def test_distances_and_pooling():
    np.testing.assert_allclose(distances(points(0), points(1)), cdist(points(0), points(1)), rtol=1e-5)
    assert not np.isnan(distances(points(0), points(0))).any()
    maps = torch.rand(2, 3, 16, 24)
    cells = maps.unflatten(2, (8, 2)).unflatten(4, (8, 3)).mean(dim=(3, 5)).flatten(1)
    torch.testing.assert_close(pooled(maps), cells / cells.norm(dim=1, keepdim=True))
    assert pooled(torch.rand(2, 3, 8, 8, 8)).shape == (2, 3 * 64)
    assert thinned(3).tolist() == [0, 1, 2] and len(thinned(10**6)) == coverage.COVERED


# ---- the order of a study


@pytest.fixture
def study(tiny_study, make_config, tmp_path):
    """study(...) -> config with selection coverage by the tiny study's weights; its own folder."""
    weights = tmp_path / "ema.safetensors"
    weights.write_bytes(next(tiny_study.parent.glob("runs/tiny/ddpm/ema_iter000006.safetensors")).read_bytes())

    def make(**finetune):
        return make_config(tmp_path / "runs", finetune={"selection": "coverage", "checkpoint": str(weights),
                                                        "shots": [2, 5], **finetune})

    return make


def test_order_is_recorded_and_made_anew_for_other_weights(study, monkeypatch):
    config, calls = study(), []
    source, features = load_source(config.dataset), coverage.image_features

    def counted(*arguments):
        calls.append(arguments)
        return features(*arguments)

    monkeypatch.setattr(coverage, "image_features", counted)
    order = coverage_order(config, source, 2)
    train = [record.id for record in source.splits["train"]]
    assert len(order) == len(set(order)) == 5 and set(order) <= set(train)
    assert coverage_order(config, source, 5) == order and len(calls) == 1
    more = coverage_order(config, source, 7)
    assert more[:5] == order and len(more) == 7 and len(calls) == 2
    path = config.experiment_dir / "ddpm" / FILE
    assert json.loads(path.read_text())["order"] == list(more)
    path.write_text("{")
    assert coverage_order(config, source, 7) == more and len(calls) == 3
    weights = coverage.choosing_path(config)
    weights.write_bytes(next(weights.parents[0].glob("*.safetensors")).read_bytes() + b" ")
    with pytest.raises(Exception, match="not a weights file"):  # others: they are looked at again
        coverage_order(config, source, 7)
    assert len(calls) == 4 and coverage_order(study(selection="random"), source, 7) is None


def test_selection_takes_the_first_of_the_order(study):
    config = study(validation=1)
    source = load_source(config.dataset)
    order = coverage_order(config, source, 5)
    chosen = select_shots(source.splits["train"], 3, 0, "coverage", order)
    assert {record.id for record in chosen} == set(order[:3])
    training, held_out = labelled_subset(source, config.finetune, 3, 0, order)
    assert {record.id for record in (*training, *held_out)} == set(order[:3]) and len(held_out) == 1
    with pytest.raises(ValueError, match="order"):
        select_shots(source.splits["train"], 3, 0, "coverage")


def test_the_first_image_is_the_nearest_to_all(study):
    """Independently of the order's code: the smallest sum of distances to all images of the pre-training."""
    config = study()
    source = load_source(config.dataset)
    images = source.pretraining_records()
    features = coverage.image_features(config, images, coverage.choosing_path(config))
    totals = cdist(features, features).sum(axis=1)
    candidates = {record.id for record in source.splits["train"]}
    best = min((total, record.id) for total, record in zip(totals, images, strict=True) if record.id in candidates)
    assert coverage_order(config, source, 1)[0] == best[1]
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, atol=1e-5)


def test_no_weights_yet(study, tmp_path):
    config = study(checkpoint=None)
    message = error_of(coverage_order, config, load_source(config.dataset), 1)
    assert 'finetune.selection "coverage" needs' in message and "ema_iter000006.safetensors" in message


# ---- the command


def test_suggest_writes_a_table_and_a_contact_sheet(tiny_study, run_main, tmp_path):
    arguments = ("--config", tiny_study, "--count", 3, "--out", tmp_path / "out", "--ignore-labels")
    status, out, err = run_main(SUGGEST, *arguments)
    assert status == 0, err
    with (tmp_path / "out/suggest.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["rank"] for row in rows] == ["1", "2", "3"] and len({row["image"] for row in rows}) == 3
    assert sum(float(row["covers_percent"]) for row in rows) == pytest.approx(100, abs=0.02)
    means = [float(row["mean_distance"]) for row in rows]
    assert means == sorted(means, reverse=True)
    assert all(row["image"] in out and row["file"] in out for row in rows)
    assert Image.open(tmp_path / "out/suggest.png").size == (3 * 240, 280)
    config = load_config(tiny_study, ["finetune.selection=coverage", f"experiment.output_dir={tmp_path}",
                                      f"finetune.checkpoint={next(tiny_study.parent.glob('runs/tiny/ddpm/*006.saf*'))}"])
    assert [row["image"] for row in rows] == list(coverage_order(config, load_source(config.dataset), 3))[:3]


def test_suggest_refuses_in_one_line(tiny_study, run_main, tmp_path):
    status, _, err = run_main(SUGGEST, "--config", tiny_study, "--count", 3)
    assert status == 2 and err.count("\n") == 1 and "--count 3 is above the 0 unlabelled images" in err
    assert "--ignore-labels" in err
    assert "at least 1" in run_main(SUGGEST, "--config", tiny_study, "--count", 0)[2]
    assert "above the 130" in run_main(SUGGEST, "--config", tiny_study, "--count", 131, "--ignore-labels")[2]
    status, _, err = run_main(SUGGEST, "--config", tiny_study, "--count", 1, "--set",
                              f"experiment.output_dir={tmp_path}")
    assert status == 2 and "run the stage pretrain first" in err and err.count("\n") == 1

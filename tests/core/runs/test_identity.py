"""What must be equal for a run to stand for the config of today, and what may differ: each setting by itself."""

import pytest

from core.config.starts import MEAN_SHAPE
from core.runs.identity import check_cell, check_pretraining, check_ssl, scoring_settings
from core.runs.places import Cell, cell_dir, ssl_dir
from core.runs.record import write_run_config
from tests.conftest import error_of
from tests.core.runs.test_cells import make


def changed(config, key, value):
    """`config` with `key`, a path of names, set to `value`."""
    section, _, rest = key.partition(".")
    inner = getattr(config, section)
    return config.model_copy(update={section: changed(inner, rest, value) if rest else value})


SCORING = [("evaluation.split", "validation"), ("evaluation.sdr_thresholds", (1.0, 7.0)), ("evaluation.leaked", "drop")]
DATA = [("dataset.name", "other"), ("dataset.image_size", (32, 32)), ("dataset.intensity", "rank")]
PLACES = [("dataset.root", "/elsewhere"), ("dataset.cache_dir", "/elsewhere"), ("dataset.phantom", None)]


@pytest.fixture
def config(tmp_path):
    return make(tmp_path)


def refuses(check, folder, config, key, value, *arguments):
    """Whether `check` lets a run of `config` stand for one whose `key` is `value`; it must name the key if it does not.

    The run's own config always may.
    """
    write_run_config(folder, config.plain(), {})
    check(config, *arguments)
    new = changed(config, key, value)
    try:
        message = error_of(check, new, *arguments)
    except pytest.fail.Exception:
        return False
    assert f"{folder} was made with {key} = " in message and "delete that folder to start over" in message
    return True


@pytest.mark.parametrize("backbone", ["ddpm", "scratch", "imagenet", MEAN_SHAPE])
@pytest.mark.parametrize(("key", "value"), [*SCORING, *DATA[:2]])
def test_every_run_is_scored_as_it_says(config, backbone, key, value):
    cell = Cell(backbone, 1, 0, 0)
    assert refuses(check_cell, cell_dir(config, cell), config, key, value, cell)


@pytest.mark.parametrize(("key", "value"), PLACES)
def test_the_data_may_move(config, key, value):
    for backbone in ("ddpm", "imagenet", MEAN_SHAPE):
        cell = Cell(backbone, 1, 0, 0)
        assert not refuses(check_cell, cell_dir(config, cell), config, key, value, cell)
    assert not refuses(check_pretraining, config.experiment_dir / "ddpm", config, key, value)
    assert not refuses(check_ssl, ssl_dir(config, "dino"), config, key, value, "dino")


@pytest.mark.parametrize(("key", "value", "concerned"), [
    ("experiment.seed", 9, {"ddpm", "scratch", "imagenet"}),
    ("experiment.name", "tiny", set()),
    ("unet.base_channels", 16, {"ddpm", "scratch"}),
    ("ddpm.learning_rate", 0.5, set()),
    ("ddpm.checkpoint_iterations", (2, 3), {"ddpm"}),
    ("finetune.selection", "first", {"ddpm", "scratch", "imagenet", MEAN_SHAPE}),
    ("finetune.validation", "none", {"ddpm", "scratch", "imagenet", MEAN_SHAPE}),
    ("finetune.weight_decay", 0.5, {"ddpm", "scratch", "imagenet"}),
    ("finetune.learning_rate.ddpm", 0.5, {"ddpm"}),
    ("finetune.learning_rate.imagenet", 0.5, {"imagenet"}),
    ("finetune.encoder", "vgg19", {"imagenet"}),
    ("finetune.backbones", ("ddpm",), set()),
    ("finetune.shots", (3,), set()),
    ("finetune.draws", (4,), set()),
    ("finetune.seeds", (4,), set()),
    ("finetune.log_every", 7, set()),
    ("finetune.save_every", 7, set()),
])
def test_what_a_cell_was_made_from(tmp_path, key, value, concerned):
    config = make(tmp_path)
    for backbone in ("ddpm", "scratch", "imagenet", MEAN_SHAPE):
        cell = Cell(backbone, 1, 0, 0)
        folder = cell_dir(config, cell)
        if cell_dir(changed(config, key, value), cell) == folder:  # else the two lie in unlike folders
            assert refuses(check_cell, folder, config, key, value, cell) == (backbone in concerned), backbone


@pytest.mark.parametrize(("key", "value", "concerned"), [
    ("experiment.seed", 9, {"ddpm", "dino"}), *((key, value, {"ddpm", "dino"}) for key, value in DATA[:2]),
    ("unet.base_channels", 16, {"ddpm"}), ("ddpm.learning_rate", 0.5, {"ddpm"}), ("finetune.weight_decay", 0.5, set()),
    ("finetune.encoder", "vgg19", {"dino"}), ("ssl.batch_size", 3, {"dino"}), ("ssl.dino.momentum", 0.5, {"dino"}),
    ("ssl.mocov3.temperature", 0.77, set()), ("evaluation.leaked", "drop", set()),
    *((f"ddpm.{key}", 7, set()) for key in ("iterations", "log_every", "validate_every", "sample_every", "save_every",
                                            "sampling_steps", "sample_count")),
    ("ddpm.checkpoint_iterations", (1, 2), set()),
    *((f"ssl.{key}", 7, set()) for key in ("workers", "log_every", "validate_every", "save_every")),
])
def test_what_a_pretraining_was_made_from(config, key, value, concerned):
    assert refuses(check_pretraining, config.experiment_dir / "ddpm", config, key, value) == ("ddpm" in concerned)
    assert refuses(check_ssl, ssl_dir(config, "dino"), config, key, value, "dino") == ("dino" in concerned)


def test_a_run_older_than_a_key_did_as_was_done_then(config):
    """A config.json without evaluation.leaked kept the leaking images; one without another key says nothing of it."""
    cell = Cell("ddpm", 1, 0, 0)
    plain = config.plain()
    del plain["evaluation"]["leaked"], plain["evaluation"]["sdr_thresholds"]
    write_run_config(cell_dir(config, cell), plain, {})
    check_cell(config, cell)
    check_cell(changed(config, "evaluation.sdr_thresholds", (1.0,)), cell)
    message = error_of(check_cell, changed(config, "evaluation.leaked", "drop"), cell)
    assert 'evaluation.leaked = "keep", now it is "drop"; choose' in message


def test_one_of_several_changes_is_named_and_the_others_counted(config):
    cell = Cell("ddpm", 1, 0, 0)
    write_run_config(cell_dir(config, cell), config.plain(), {})
    new = config
    for number, (key, value) in enumerate(SCORING):
        new = changed(new, key, value)
        more = f" and {number} more" if number else ""
        assert f"{more}; choose another experiment.name" in error_of(check_cell, new, cell)


def test_a_folder_without_a_run_may_become_any(config, tmp_path):
    check_cell(config, Cell("ddpm", 1, 0, 0))
    check_pretraining(config)
    check_ssl(config, "dino")


@pytest.mark.parametrize(("finetune", "concerned"), [
    ({}, True), ({"pretraining_iteration": 2}, False), ({"checkpoint": "weights/x.safetensors"}, False)])
def test_the_last_iteration_counts_for_a_cell_that_names_no_start(tmp_path, finetune, concerned):
    config, cell = make(tmp_path, **finetune), Cell("ddpm", 1, 0, 0)
    assert refuses(check_cell, cell_dir(config, cell), config, "ddpm.checkpoint_iterations", (2, 3), cell) == concerned


def test_the_settings_of_a_score(config):
    """With the decoder that was asked for in place of the config's."""
    own, other = (scoring_settings(config, "ddpm", decoder) for decoder in (None, "argmax"))
    assert own["evaluation.split"] == "test" and own["evaluation.leaked"] == config.evaluation.leaked
    assert own["finetune.decoder"] == config.finetune.decoder != "argmax"
    assert other == own | {"finetune.decoder": "argmax"}
    assert "ddpm.learning_rate" not in own and "experiment.seed" not in own

"""Axes of a study beside shots, draws, seeds and starts: losses, pre-training iterations, another study's DDPM."""

import json

import pytest

from core.config.load import load_config, parse_config
from core.errors import UserError
from core.runs.cells import settings_compared, single_setting
from core.runs.identity import check_cell
from core.runs.places import Cell, cell_dir, file_slug
from core.runs.record import write_run_config
from study.runs import study_runs
from study.timing import time_left
from tests.conftest import error_of
from tests.core.runs.test_cells import log, make, touch

CONTOUR = {"target": "pixel"}
CHANNELS = {"loss": "cross_entropy_channels", "target": "disk", "shape_prior": None}


def folders(config, stages=("finetune",)):
    """<backbone>/<variant>/<cell> of every run, in order."""
    home = config.experiment_dir / "landmarks"
    return [run.folder.relative_to(home).as_posix() for run in study_runs(config, stages)]


def usual(tmp_path, **finetune):
    """One cell for each start, under the default names."""
    return make(tmp_path, **{"iterations": 400, "batch_size": 8, "shots": [5], "draws": [0], "seeds": [0], **finetune})


def test_losses_are_an_axis(tmp_path):
    """By hand: each loss with each start, the guess of the mean shape once; the first entry is finetune's own."""
    config = usual(tmp_path, losses=[{}, CONTOUR, {**CHANNELS, "sigma": 5.0}])
    channels = "loss-cross_entropy_channels_target-disk_sigma-5.0_prior-off"
    assert folders(config) == [f"{place}/shots005_draw0_seed0" for place in (
        "mean_shape/default", "ddpm/default", "scratch/default", "ddpm/target-pixel", "scratch/target-pixel",
        f"ddpm/{channels}", f"scratch/{channels}")]
    assert len(study_runs(make(tmp_path, losses=[{}, CONTOUR]), ("finetune",))) == 4 + 2 * 16  # see test_study
    assert folders(usual(tmp_path)) == folders(usual(tmp_path, losses=[{}]))
    assert "ddpm/default/shots005_draw0_seed0" not in folders(usual(tmp_path, losses=[CONTOUR]))


def test_an_entry_falls_back_on_what_finetune_says(tmp_path):
    config = usual(tmp_path, **CHANNELS, losses=[{}, {"loss": "cross_entropy_pixels", "shape_prior": 0.1}])
    first, second = config.finetune.losses
    assert (first.loss, first.target, first.sigma, first.shape_prior) == ("cross_entropy_channels", "disk", 2.5, None)
    assert (second.loss, second.target, second.shape_prior) == ("cross_entropy_pixels", "disk", 0.1)
    assert parse_config(json.loads(json.dumps(config.plain())), "again") == config


@pytest.mark.parametrize("losses, message", [
    ([{}, {"loss": "cross_entropy_channels"}], 'tiny: finetune.losses.1: finetune.shape_prior needs finetune.loss '
                                               '"cross_entropy_pixels"; set it to null'),
    ([{**CHANNELS, "decoder": "window_mass"}], 'finetune.losses.0: finetune.decoder "window_mass" needs'),
    ([{"target": "circle"}], "finetune.losses.0.target: input should be 'disk', 'gaussian' or 'pixel', got 'circle'"),
    ([{"targt": "disk"}], 'unknown key finetune.losses.0.targt (did you mean "target"?); valid: decoder, loss, '
                          "shape_prior, sigma, target"),
    ([CONTOUR, {}, CONTOUR], "finetune.losses holds the same settings twice: "),
    (["contour"], "finetune.losses.0: input should be an object, got 'contour'"),
    ("contour", "finetune.losses: input should be a valid array, got 'contour'"),
])  # fmt: skip
def test_impossible_losses(tmp_path, losses, message):
    assert message in error_of(lambda: make(tmp_path, losses=losses))


def test_a_loss_that_volumes_do_not_have(tmp_path):
    values = make(tmp_path, losses=[{}]).plain()
    values["dataset"] |= {"layout": "folder", "image_size": [16] * 3, "phantom": None}
    values["finetune"]["losses"].append({"decoder": "contour_centroid"})
    assert '"contour_centroid" is 2D only' in error_of(lambda: parse_config({**values, "is_3d": True}, "tiny"))


def test_every_iteration_is_run_for_the_best(tmp_path):
    """ddpm from each checkpoint, in the folders of an explicit iteration; the other starts once; both losses."""
    config = usual(tmp_path, pretraining_iteration="best", losses=[{}, CONTOUR])
    cell = "shots005_draw0_seed0"
    assert folders(config) == [
        f"mean_shape/default/{cell}", f"scratch/default/{cell}", f"ddpm/iter-2/{cell}", f"ddpm/iter-4/{cell}",
        f"scratch/target-pixel/{cell}", f"ddpm/target-pixel_iter-2/{cell}", f"ddpm/target-pixel_iter-4/{cell}"]
    assert all(run.needs == (config.experiment_dir / "ddpm",) for run in study_runs(config, ("finetune",))
               if run.kind == "ddpm")
    explicit = usual(tmp_path, pretraining_iteration=2)
    assert cell_dir(explicit, Cell("ddpm", 5, 0, 0)) in [run.folder for run in study_runs(config, ("finetune",))]
    assert folders(usual(tmp_path, pretraining_iteration="best", backbones=["scratch"])) == folders(
        usual(tmp_path, backbones=["scratch"]))


def test_runs_of_an_explicit_iteration_are_used_again(tmp_path):
    """Also those whose config.json is older than the new keys; but a changed setting is still refused."""
    plain = usual(tmp_path, pretraining_iteration=2).plain()
    for key in ("losses", "transfer_from"):
        del plain["finetune"][key]
    asked = {"pretraining_iteration": "best", "losses": [{}], "backbones": ["ddpm"]}
    first = next(each for each in settings_compared(usual(tmp_path, **asked))
                 if each.finetune.pretraining_iteration == 2)
    cell = Cell("ddpm", 5, 0, 0)
    write_run_config(cell_dir(first, cell), plain, {})
    check_cell(first, cell)
    (slower, *_) = (each for each in settings_compared(usual(tmp_path, **asked, weight_decay=0.5))
                    if each.finetune.pretraining_iteration == 2)
    with pytest.raises(UserError, match=r"was made with finetune.weight_decay = 0.01, now it is 0.5;"):
        check_cell(slower, cell)


def test_the_best_needs_something_to_choose_by(tmp_path):
    fixed = {"pretraining_iteration": "best", "validation": "none"}
    assert '"best" is chosen by the validation error, and finetune.validation is "none"' in error_of(
        lambda: make(tmp_path, **fixed))
    assert "give one of the two" in error_of(
        lambda: make(tmp_path, pretraining_iteration="best", checkpoint="weights/x.pt"))
    wrong = error_of(lambda: make(tmp_path, pretraining_iteration="worst"))
    assert "pretraining_iteration: input should be 'best', or input should be a valid integer" in wrong


@pytest.fixture
def other(tmp_path):
    """runs/hand with a finished diffusion pre-training of iterations 3 and 6."""
    folder = tmp_path / "runs" / "hand"
    theirs = make(tmp_path, ddpm={"iterations": 6, "checkpoint_iterations": [3, 6]}).plain()
    write_run_config(folder / "ddpm", theirs, {})
    for iteration in (3, 6):
        touch(folder / f"ddpm/ema_iter{iteration:06d}.safetensors")
    return folder


def test_ddpm_from_another_study(tmp_path, other):
    """Beside the study's own start; the last checkpoint there, or the one asked for, or all of them."""
    cell, own = "shots005_draw0_seed0", ["mean_shape/default", "ddpm/default", "scratch/default"]
    away = {iteration: file_slug(str(other / f"ddpm/ema_iter{iteration:06d}.safetensors")) for iteration in (3, 6)}
    config = usual(tmp_path, transfer_from=str(other))
    assert folders(config) == [f"{place}/{cell}" for place in (*own, f"ddpm/from-{away[6]}")]
    run = study_runs(config, ("finetune",))[-1]
    assert run.config.finetune.checkpoint == str(other / "ddpm/ema_iter000006.safetensors") and run.needs == ()
    every = folders(usual(tmp_path, transfer_from=str(other), pretraining_iteration="best", backbones=["ddpm"]))
    assert every == [f"{place}/{cell}" for place in (
        "mean_shape/default", "ddpm/iter-2", "ddpm/iter-4", f"ddpm/from-{away[3]}", f"ddpm/from-{away[6]}")]


def test_another_study_that_cannot_be_used(tmp_path, other):
    def why(**finetune):
        return error_of(study_runs, usual(tmp_path, transfer_from=str(other), **finetune), ("finetune",))

    assert "ema_iter000004.safetensors is not there (yet); it keeps iterations 3, 6" in why(pretraining_iteration=4)
    (other / "ddpm/ema_iter000006.safetensors").unlink()  # half-way: what is there is not its last one
    assert "ema_iter000006.safetensors is not there (yet)" in why()
    theirs = json.loads((other / "ddpm/config.json").read_text())
    theirs["unet"]["base_channels"] = 16
    (other / "ddpm/config.json").write_text(json.dumps(theirs))
    assert "its network has unet.base_channels 16, this study's 8; they must be the same" in why()
    (other / "ddpm/config.json").unlink()
    assert f"finetune.transfer_from {other}: " in why() and "holds no diffusion pre-training" in why()


@pytest.mark.parametrize("finetune", [{"backbones": ["scratch"]}, {"checkpoint": "x.pt"}])
def test_transfer_is_beside_the_study_s_own_ddpm(tmp_path, finetune):
    message = error_of(lambda: make(tmp_path, transfer_from="runs/hand", **finetune))
    assert 'it needs "ddpm" in finetune.backbones, and no finetune.checkpoint' in message
    itself = error_of(lambda: make(tmp_path, transfer_from=str(tmp_path / "runs/../runs/tiny")))
    assert "is this study's own folder" in itself


def test_one_run_has_one_setting(tmp_path, other):
    several = usual(tmp_path, losses=[{}, CONTOUR], pretraining_iteration="best")
    message = error_of(single_setting, several, "ddpm")
    assert "runs ddpm in 4 settings (iter-2, iter-4, target-pixel_iter-2, target-pixel_iter-4)" in message
    assert "runs imagenet in 2 settings (default, target-pixel)" in error_of(single_setting, several, "imagenet")
    one = single_setting(usual(tmp_path, losses=[CONTOUR], transfer_from=str(other)), "ddpm")
    assert (one.finetune.target, one.finetune.losses, one.finetune.checkpoint) == ("pixel", (), None)
    assert one.finetune.backbones == ("ddpm", "scratch")
    plain = usual(tmp_path)
    assert single_setting(plain, "ddpm") == plain


def test_time_of_the_settings(tmp_path):
    """By hand: 20 steps of iter-2 took 10 s, so iter-4's 20 steps take 10 s more; scratch is not known."""
    config = make(tmp_path, pretraining_iteration="best", shots=[5], draws=[0], seeds=[0])
    ready = [run for run in study_runs(config, ("finetune",)) if "iter-2" in str(run.folder)]
    log(ready[0].folder, {"step": 20, "seconds": 10.0})
    touch(ready[0].folder / "metrics.json")
    runs = study_runs(config, ("finetune",))
    assert time_left(runs) == "about 10 s and 20 steps of scratch (no run measured yet)"
    assert time_left([run for run in runs if not run.done]) == time_left(runs)  # by the other variant


def test_losses_on_the_command_line(tmp_path):
    path = tmp_path / "c.json"
    path.write_text(json.dumps({"experiment": {"name": "a"}}))
    config = load_config(path, ['finetune.losses=[{}, {"target": "pixel"}]', "finetune.pretraining_iteration=best",
                                "finetune.sigma=4"])
    assert [entry.sigma for entry in config.finetune.losses] == [4.0, 4.0]
    assert len(settings_compared(config)) == 2 * (1 + 4)

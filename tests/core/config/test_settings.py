"""What a setting counts for and how it is named is said once, in its metadata: compared with lists written by hand."""

import pytest

from core.config.settings import all_settings, counting_for
from core.config.ssl import SSL
from core.config.starts import BACKBONES

EARLIER = ("gu2net", "global_to_local")
SSL_METHODS = ("mocov3", "simclrv2", "dino")
# The lists that stood in core/runs/places.py and core/runs/identity.py before the metadata.
VARIANT_KEYS = {"loss": "loss", "target": "target", "sigma": "sigma", "decoder": "decoder", "shape_prior": "prior",
                "timestep": "t", "pretraining_iteration": "iter", "checkpoint": "from", "encoder": "encoder",
                "encoder_weights": "weights", "iterations": "steps", "epochs": "epochs",
                "learning_rate": "lr", "validation": "val", "selection": "pick", "shape_modes": "modes",
                "ema_decay": "ema",
                "batch_size": "batch", "scheduler": "schedule", "evaluation": "folds"}  # fmt: skip
STAGED_KEYS = {"refine.zoom": "zoom", "refine.crop": "crop", "refine.start": "fine", "refine.sigma": "fine-sigma",
               "refine.prior": "fine-prior", "refine.iterations": "fine-steps", "refine.batch_size": "fine-batch",
               "self_training.rounds": "rounds", "self_training.matching": "match", "self_training.images": "pseudo",
               "self_training.share": "pseudo-share", "self_training.power": "pseudo-power"}  # fmt: skip
EARLIER_KEYS = {"gu2net.preset": "preset", "gu2net.learning_rate": "lr", "gu2net.cycle_iterations": "cycle",
                "gu2net.together": "with",
                **{f"global_to_local.{key}": slug for key, slug in {
                    "preset": "preset", "patch": "patch", "presence_weight": "presence", "channels": "width",
                    "local.iterations": "local-steps", "local.window": "window", "local.window_mm": "window-mm",
                    "local.zoom": "zoom", "local.batch_size": "local-batch", "local.channels": "local-width"}.items()}}
HEATMAP_KEYS = ("target", "sigma", "decoder", "shape_prior", "shape_modes", "refine")
SOFTMAX_KEYS = ("loss", *HEATMAP_KEYS)
OWN_KEYS = {"ddpm": ("timestep", "pretraining_iteration", "checkpoint", "refine.start", "self_training.matching",
                     *SOFTMAX_KEYS),
            "scratch": SOFTMAX_KEYS, "random": ("encoder", *SOFTMAX_KEYS),
            **dict.fromkeys(("imagenet", *SSL_METHODS), ("encoder", "encoder_weights", *SOFTMAX_KEYS)),
            "gu2net": ("gu2net", *HEATMAP_KEYS), "global_to_local": ("global_to_local",)}  # fmt: skip
FILE_KEYS = ("checkpoint", "encoder_weights")
BY_BACKBONE = ("learning_rate", "encoder_weights")
PLACES = ("dataset.root", "dataset.cache_dir", "dataset.max_megapixels")
PRETRAINING_FREE = (*PLACES, "ddpm.iterations", "ddpm.log_every", "ddpm.validate_every", "ddpm.sample_every",
                    "ddpm.save_every", "ddpm.sampler", "ddpm.sampling_steps", "ddpm.sample_count",
                    "ddpm.checkpoint_iterations")  # fmt: skip
SSL_FREE = (*PLACES, "ssl.workers", "ssl.log_every", "ssl.validate_every", "ssl.save_every")
CELL_FREE = (*PLACES, "finetune.backbones", "finetune.shots", "finetune.draws", "finetune.seeds", "finetune.log_every",
             "finetune.save_every", "finetune.decoder", "finetune.shape_prior", "finetune.losses",
             "finetune.transfer_from", "finetune.refine.prior")  # fmt: skip
SCORING = {"evaluation.split", "evaluation.sdr_thresholds", "evaluation.leaked"}
OF_A_DETECTOR = {"evaluation.window_overlap", "evaluation.views", "finetune.decoder", "finetune.shape_prior",
                 "finetune.refine.prior"}


def below(sections, free=()):
    """The keys in `sections` but for those that are `free`, sections or not."""
    return {key for key in all_settings() if any(f"{key}.".startswith(f"{section}.") for section in sections)
            and not any(f"{key}.".startswith(f"{section}.") for section in free)}  # fmt: skip


def test_pretraining_and_ssl_watch_the_same_keys_as_before():
    assert counting_for("pretraining", "ddpm") == below(("experiment.seed", "dataset", "unet", "ddpm"),
                                                        PRETRAINING_FREE)
    shared = [f"ssl.{key}" for key in SSL.model_fields if key not in SSL_METHODS]
    for method in SSL_METHODS:
        sections = ("experiment.seed", "dataset", "finetune.encoder", *shared, f"ssl.{method}")
        assert counting_for("ssl", method) == below(sections, SSL_FREE)
    assert len(counting_for("ssl", "dino")) == 50


@pytest.mark.parametrize("backbone", BACKBONES)
def test_cells_watch_the_same_keys_as_before(backbone):
    foreign = {key for keys in OWN_KEYS.values() for key in keys} - set(OWN_KEYS.get(backbone, ()))
    others = [f"finetune.{key}.{name}" for key in BY_BACKBONE for name in BACKBONES if name != backbone]
    free = (*CELL_FREE, *others, *(f"finetune.{key}" for key in foreign))
    network = {"ddpm": ("unet", "ddpm.checkpoint_iterations"), "scratch": ("unet",)}.get(backbone, ())
    assert counting_for("training", backbone) == below(
        ("experiment.seed", "dataset", *network, "finetune", "evaluation.folds"), free)
    assert counting_for("scoring", backbone) == SCORING | (set() if backbone == "global_to_local" else OF_A_DETECTOR)


def test_the_mean_shape_depends_on_data_and_labels():
    assert counting_for("training", "mean_shape") == below(
        ("dataset", "finetune.selection", "finetune.validation", "evaluation.folds"), PLACES)
    assert counting_for("scoring", "mean_shape") == SCORING


def test_names_in_variants_as_before():
    """In the order of the folders' names; of learning rates and weights each start has its own."""
    slugs = {key.removeprefix("finetune."): each.slug for key, each in all_settings().items() if each.slug}
    assert {key: slug for key, slug in slugs.items() if "refine" in key or "self_training" in key} == STAGED_KEYS
    assert {key: slug for key, slug in slugs.items() if key.split(".")[0] in EARLIER} == EARLIER_KEYS
    others = [(key.split(".")[0], slug) for key, slug in slugs.items() if key not in {**STAGED_KEYS, **EARLIER_KEYS}]
    assert list(dict.fromkeys(others)) == list(VARIANT_KEYS.items())
    for key, each in all_settings().items():
        name = key.removeprefix("finetune.").split(".")[0]
        assert each.is_file == (key.startswith("finetune.") and name in FILE_KEYS), key
        if each.slug and name in BY_BACKBONE:
            assert each.backbones == (key.split(".")[2],)
        elif each.slug:
            alone = {backbone for backbone, keys in OWN_KEYS.items() if key.removeprefix("finetune.") in keys}
            owners = alone or {backbone for backbone, keys in OWN_KEYS.items() if name in keys}
            assert set(each.backbones) - {"mean_shape"} == (owners or set(BACKBONES)), key
    assert {key: each.before for key, each in all_settings().items() if each.before is not None} == {
        "evaluation.leaked": "keep", "evaluation.views": 1, "ddpm.objective": "noise", "finetune.shape_modes": 0,
        "finetune.optimizer": "adamw",
        **{f"{stage}.augmentation.{name}": 0.0 for stage in ("ddpm", "finetune", "finetune.refine",
                                                                   "finetune.global_to_local.local")
           for name in ("elastic", "artefacts")}}


def test_every_setting_has_a_role_and_a_meaning():
    roles = {key: each.role for key, each in all_settings().items()}
    assert len(roles) >= 192 and set(roles.values()) == {"identity", "scoring", "free"}
    assert [roles[key] for key in ("ddpm.learning_rate", "finetune.encoder", "finetune.decoder", "evaluation.split",
                                   "dataset.root", "slurm.mem_gb", "ddpm.augmentation.scale", "ddpm.save_every")] == [
        "identity", "identity", "scoring", "scoring", "free", "free", "identity", "free"]
    assert not [key for key, each in all_settings().items() if len(each.description.split()) < 2]


def test_conditions_name_settings_that_exist():
    """A condition's key is one of the file, and a value that leaves the setting idle is one that it can have."""
    conditions = [(key, each) for key, setting in all_settings().items() for each in setting.acts]
    assert len(conditions) > 20
    assert not [(key, each.key) for key, each in conditions if set(each.key.split(" and ")) - set(all_settings())]

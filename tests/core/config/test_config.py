"""The config: inheritance, overrides, strictness, impossible combinations, and the files that are shipped."""

import json

import jsonschema
import pytest

from core.config.dataset import check_divisible
from core.config.load import CONFIG_DIR, add_config_arguments, load_config, parse_config
from core.config.reference import PAGE, reference
from core.config.schema import write_schema
from core.errors import CommandParser, UserError

SHIPPED = sorted([path for path in CONFIG_DIR.glob("*.json") if path.name != "schema.json"]
                 + list((CONFIG_DIR.parent / "benchmarks/studies").glob("*.json")))
MINIMAL = {"finetune": {"iterations": 10}}


def write(path, **values):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values))
    return path


@pytest.fixture
def minimal(tmp_path):
    return write(tmp_path / "minimal.json", **MINIMAL)


def error_of(path, *overrides):
    """The one line in which loading `path` must end."""
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_extends_merges_sections_along_a_chain(tmp_path):
    write(tmp_path / "top.json", finetune={"iterations": 7, "shots": [1, 5]}, unet={"base_channels": 8})
    write(tmp_path / "middle.json", extends="top.json", finetune={"shots": [2]}, ddpm={"clip": {"mode": "none"}})
    leaf = write(tmp_path / "deep/leaf.json", extends="../middle.json", unet={"norm_groups": 2}, ddpm={"batch_size": 3})
    config = load_config(leaf)
    assert (config.finetune.iterations, config.finetune.shots) == (7, (2,))  # lists are replaced, not joined
    assert (config.unet.base_channels, config.unet.norm_groups) == (8, 2)
    assert (config.ddpm.clip.mode, config.ddpm.batch_size) == ("none", 3)


def test_extends_takes_a_shipped_config_where_no_such_file_lies_beside(tmp_path):
    leaf = write(tmp_path / "leaf.json", extends="cpu.json")
    assert load_config(leaf).dataset.image_size == load_config(CONFIG_DIR / "cpu.json").dataset.image_size
    write(tmp_path / "cpu.json", dataset={"image_size": [64, 64]})
    assert load_config(leaf).dataset.image_size == (64, 64)
    assert "does not exist" in error_of(write(tmp_path / "other.json", extends="deep/cpu.json"))


def test_extends_missing_wrong_or_circular(tmp_path):
    path = write(tmp_path / "a.json", extends="gone.json")
    assert f"gone.json, which {path} extends, does not exist; configs/ holds" in error_of(path)
    assert "demo.json" in error_of(path) and "schema.json" not in error_of(path)
    assert "extends must name one file" in error_of(write(path, extends=["b.json"]))
    write(path, extends="b.json")
    write(tmp_path / "b.json", extends="a.json")
    assert "extends itself through a.json -> b.json" in error_of(path)
    here = write(tmp_path / "here.json", extends=f"../{tmp_path.name}/here.json")  # never twice under the same name
    assert "extends itself through here.json" in error_of(here)
    loop = tmp_path / "loop.json"
    loop.symlink_to(loop)
    assert "loop.json does not exist" in error_of(loop)


@pytest.mark.parametrize("content, message", [
    (b'{"a": 1,}', "not valid JSON"), (b'{"a": "\xff"}', "not valid JSON"), (b"[]", "must hold one JSON object"),
    (b'{"finetune": []}', "finetune: input should be an object"),
])
def test_unreadable_files(tmp_path, content, message):
    (tmp_path / "a.json").write_bytes(content)
    assert f"a.json: {message}" in error_of(tmp_path / "a.json")


def test_set_takes_every_type(minimal):
    config = load_config(minimal, [
        "experiment.name=mine-2", "experiment.compile=true", "ddpm.learning_rate=3e-4", "dataset.image_size=[64, 48]",
        "finetune.timestep=null", 'finetune.validation="none"', "finetune.learning_rate.ddpm=1",
        "finetune.learning_rate.imagenet=0.5", "ddpm.clip.limit=2", "evaluation.split=validation",
    ])  # fmt: skip
    assert (config.experiment.name, config.experiment.compile) == ("mine-2", True)
    assert (config.ddpm.learning_rate, config.dataset.image_size) == (3e-4, (64, 48))
    assert (config.finetune.timestep, config.finetune.validation) == (None, "none")
    assert config.finetune.learning_rate.model_dump() == {
        "ddpm": 1.0, "scratch": 1e-3, "imagenet": 0.5, "random": 1e-3, "mocov3": 1e-3, "simclrv2": 1e-3, "dino": 1e-3,
        "gu2net": 1e-3, "global_to_local": 1e-3}
    assert (config.ddpm.clip.mode, config.ddpm.clip.limit, config.evaluation.split) == ("norm", 2.0, "validation")


def test_value_may_hold_an_equals_sign(minimal):
    assert load_config(minimal, ["dataset.root=a=b"]).dataset.root == "a=b"


@pytest.mark.parametrize("override, message", [
    ("finetune", "--set finetune: must read section.key=value"),
    ("finetune.iterations.first=1", "--set finetune.iterations.first=1: iterations is not a section"),
    ("finetun.shots=[1]", r'unknown key finetun (did you mean "finetune"?); valid: $schema, dataset, ddpm,'),
    ("finetune.shot=[1]", r'unknown key finetune.shot (did you mean "shots"?); valid: '),
    ("ddpm.clip.limt=1", r'unknown key ddpm.clip.limt (did you mean "limit"?); valid: limit, mode'),
    ("dataset.phantom.cuont=200", r'unknown key dataset.phantom.cuont (did you mean "count"?)'),
    ("schema_=x", r'unknown key schema_ (did you mean "$schema"?)'),
    ('ddpm.iterations="10"', "ddpm.iterations: input should be a valid integer, got '10'"),
    ("ddpm.iterations=10.0", "ddpm.iterations: input should be a valid integer, got 10.0"),
    ("ddpm.iterations=true", "ddpm.iterations: input should be a valid integer, got True"),
    ("experiment.compile=1", "experiment.compile: input should be a valid boolean, got 1"),
    ("experiment.name=10", "experiment.name: input should be a valid string, got 10"),
    ("experiment.name=a/b", "experiment.name: string should match pattern"),
    ('finetune.shots=[1,"2"]', "finetune.shots.1: input should be a valid integer, got '2'"),
    ("finetune.loss=dice", "finetune.loss: input should be 'cross_entropy_pixels' or 'cross_entropy_channels', got"),
    ("finetune.validation=x", "finetune.validation: input should be 'official' or 'none', or input should be a valid "
                              "integer, got 'x'"),
    ("ddpm=5", "ddpm: input should be an object, got 5"),
    ("unet.base_channels=0", "unet.base_channels: input should be greater than 0"),
    ("finetune.shots=[0]", "finetune.shots.0: input should be greater than 0"),
    ("finetune.shots=[]", "finetune.shots: tuple should have at least 1 item"),
    ("finetune.draws=[-1]", "finetune.draws.0: input should be greater than or equal to 0"),
    ("finetune.learning_rate.ddpm=-1", "finetune.learning_rate.ddpm: input should be greater than 0"),
    ("finetune.learning_rate.imagnet=1", 'unknown key finetune.learning_rate.imagnet (did you mean "imagenet"?); '
                                         "valid: ddpm, dino, global_to_local, gu2net, imagenet, mocov3, random, "
                                         "scratch, simclrv2"),
    ('finetune.backbones=["dyno"]', "finetune.backbones.0: input should be 'ddpm', 'scratch', 'imagenet', 'random', "
                                    "'mocov3', 'simclrv2', 'dino', 'gu2net' or 'global_to_local'"),
    ("finetune.encoder=resnet18", "finetune.encoder: input should be 'densenet161', 'vgg19', 'resnext50_32x4d' or "
                                  "'resnet50', got 'resnet18'"),
    ("unet.channel_multipliers=[]", "unet.channel_multipliers: tuple should have at least 1 item"),
])  # fmt: skip
def test_wrong_override(minimal, override, message):
    assert message in error_of(minimal, override)


@pytest.mark.parametrize("overrides, message", [
    (["is_3d=true"], "dataset.image_size needs 3 numbers when is_3d is true"),
    (["dataset.image_size=[64,64,64]"], "dataset.image_size needs 2 numbers when is_3d is false"),
    (["is_3d=true", "dataset.image_size=[64,64,64]", "dataset.layout=cephalo"], "holds radiographs"),
    (["is_3d=true", "dataset.image_size=[64,64,60]"], "4 levels need multiples of 8; nearest to 60: 56 or 64"),
    (["is_3d=true", "dataset.image_size=[64,64,64]", "finetune.decoder=contour_centroid"], "is 2D only"),
    (["dataset.layout=hand", "dataset.resample_mm=0.2"], 'needs images in mm: layout "folder" or "cephalo"'),
    (["dataset.layout=hand", "dataset.description=a.json"], 'belongs to layout "folder"'),
    (['dataset.phantom={"count": 12, "size": [64, 64, 64]}'], "writes radiographs of two sizes"),
    (['dataset.phantom={"count": 200}'], "writes radiographs of two sizes"),
    (['dataset.phantom={"count": 151}'], "dataset.phantom.count must be at least 152"),
    (["dataset.image_size=[64,50]"], "4 levels need multiples of 8; nearest to 50: 48 or 56"),
    (["unet.norm_groups=3"], "unet.norm_groups 3 must divide base_channels 64"),
    (["unet.full_attention_sizes=[30]"], "unet.full_attention_sizes [30] are no sizes of a level; those are [256, 128"),
    (["dataset.intensity=window"], "needs dataset.window"),
    (["dataset.intensity=window", "dataset.window=[5,5]"], "low < high"),
    (["dataset.percentiles=[99,1]"], "0 <= low < high <= 100"),
    (["ddpm.iterations=5000"], "ddpm.checkpoint_iterations [6000, 8000, 10000] must lie in 1..ddpm.iterations (5000)"),
    (["ddpm.checkpoint_iterations=[]"], "ddpm.checkpoint_iterations [] must lie in"),
    (["ddpm.min_timestep=500"], "ddpm.min_timestep must be below ddpm.num_train_timesteps"),
    (["ddpm.sampling_steps=501"], "ddpm.sampling_steps must not exceed"),
    (["finetune.timestep=500"], "finetune.timestep 500 must be below ddpm.num_train_timesteps"),
    (["finetune.pretraining_iteration=5000"], "5000 is not one of ddpm.checkpoint_iterations [4000, 6000, 8000, 10000"),
    (["finetune.epochs=5"], "exactly one of iterations and epochs"),
    (["finetune.iterations=null"], "exactly one of iterations and epochs"),
    (['finetune.backbones=["imagenet"]', "dataset.image_size=[64,72]"], "dataset.image_size [64, 72]: imagenet's "
     "encoder's 6 levels need multiples of 32; nearest to 72: 64 or 96"),
    (['finetune.backbones=["ddpm","random"]', "is_3d=true", "dataset.image_size=[64,64,64]"],
     'backbone "random" is a 2D baseline; with is_3d choose from ddpm, scratch'),
    (["finetune.validation=none", "finetune.scheduler=plateau"], "needs a fixed schedule"),
    (["finetune.validation=none", "finetune.early_stop_patience=3"], "needs a fixed schedule"),
    (["finetune.loss=cross_entropy_channels"], 'finetune.shape_prior needs finetune.loss "cross_entropy_pixels"'),
    (["finetune.decoder=window_mass", "finetune.loss=cross_entropy_channels"], 'window_mass" needs finetune.loss'),
    (["finetune.validation=0"], "or a number of at least 1"),
    (["finetune.validation=5", "finetune.shots=[10,5]"], "validation 5 leaves no training image at 5 shots"),
])  # fmt: skip
def test_impossible_combination(minimal, overrides, message):
    assert message in error_of(minimal, *overrides)


def test_combinations_at_the_limit_are_allowed(minimal):
    load_config(minimal, ["dataset.image_size=[64,48]", "unet.full_attention_sizes=[8]", "ddpm.min_timestep=499",
                          "finetune.timestep=499", "finetune.pretraining_iteration=6000", "finetune.validation=4",
                          "finetune.shots=[5]", "ddpm.sampling_steps=500"])
    load_config(minimal, ["finetune.validation=none", "finetune.iterations=null", "finetune.epochs=3"])
    load_config(minimal, ['finetune.backbones=["imagenet","random"]', "dataset.image_size=[32,96]"])


@pytest.mark.parametrize("size, levels, message", [
    ((63, 64), 4, "nearest to 63: 56 or 64"), ((64, 5), 4, "nearest to 5: 8"), ((0, 8), 3, "nearest to 0: 4"),
    ((8, 8, 9), 2, "nearest to 9: 8 or 10"),
])
def test_sizes_not_divisible_name_the_nearest(size, levels, message):
    with pytest.raises(ValueError, match=f"multiples of {2 ** (levels - 1)}; {message}$"):
        check_divisible(size, levels)
    check_divisible((64, 8, 16), 4)


def test_command_line_beats_json_beats_default(minimal):
    parser = CommandParser()
    add_config_arguments(parser)
    write(minimal, **MINIMAL, ddpm={"batch_size": 3, "accumulation": 2})
    line = ["--config", str(minimal), "--set", "ddpm.batch_size=5", "--set", "is_3d=false", "ddpm.ema_decay=0.5"]
    arguments = parser.parse_args(line)
    ddpm = load_config(arguments.config, arguments.set).ddpm
    assert (ddpm.batch_size, ddpm.accumulation, ddpm.ema_decay) == (5, 2, 0.5)
    assert ddpm.warmup_iterations == 0 and load_config(minimal).ddpm.ema_decay == 0.995
    assert parser.parse_args([]).config == str(CONFIG_DIR / "demo.json")


def test_config_is_frozen_and_survives_its_own_file(minimal):
    config = load_config(minimal, ["ddpm.clip.mode=value", "finetune.timestep=10"])
    with pytest.raises(ValueError, match="frozen"):
        config.unet.base_channels = 8
    assert parse_config(json.loads(json.dumps(config.plain())), "again") == config


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_config(path):
    schema = json.loads((CONFIG_DIR / "schema.json").read_text())
    values = json.loads(path.read_text())
    jsonschema.Draft202012Validator(schema).validate(values)
    assert (path.parent / values["$schema"]).resolve() == CONFIG_DIR / "schema.json"
    load_config(path)


def test_schema_refuses_what_the_models_refuse():
    validator = jsonschema.Draft202012Validator(json.loads((CONFIG_DIR / "schema.json").read_text()))
    assert validator.is_valid({"extends": "config.json", "ddpm": {"batch_size": 2}})
    for wrong in ({"ddmp": {}}, {"ddpm": {"batch": 2}}, {"ddpm": {"batch_size": "2"}}, {"ddpm": {"batch_size": 0}},
                  {"extends": 3}, {"finetune": {"loss": "dice"}}, {"finetune": {"clip": {"mod": "none"}}}):
        assert not validator.is_valid(wrong), wrong


def test_schema_file_is_up_to_date(tmp_path):
    write_schema(tmp_path / "schema.json")
    fresh = (tmp_path / "schema.json").read_text() == (CONFIG_DIR / "schema.json").read_text()
    assert fresh, "run python -m core.config.schema"


def test_reference_is_up_to_date():
    assert PAGE.read_text() == reference(), "run python -m core.config.reference"


def test_reference_says_what_a_key_is():
    """Rows written by hand, and a row for each key, with no cell left empty."""
    rows = [line.strip("|").split(" | ") for line in reference().splitlines() if line.startswith("| `")]
    assert all(len(row) == 5 and all(cell.strip() for cell in row) for row in rows)
    assert [row[0].strip(" `") for row in rows if "ddpm.clip" in row[0]] == ["ddpm.clip.mode", "ddpm.clip.limit"]
    for row in ("| `evaluation.split` | `test`, `validation` | `\"test\"` | scoring | images that are scored: choose "
                "settings on validation, test once; only where evaluation.folds is null |",
                "| `finetune.learning_rate.dino` | number above 0 | `0.001` | identity: training | of an encoder from "
                "DINO; for dino (`lr-` in a variant's name) |",
                "| `dataset.percentiles` | [number, number] | `[1.0, 99.0]` | identity: pretraining, ssl, training | "
                'percentiles of an image that become 0 and 1; only where dataset.intensity is "percentile" |'):
        assert row in reference()


def test_paper_presets():
    paper, text = load_config(CONFIG_DIR / "paper.json"), load_config(CONFIG_DIR / "paper_text.json")
    assert paper.dataset.image_size == (256, 256) and paper.unet.channel_multipliers == (1, 2, 4, 8)
    assert (paper.unet.base_channels, paper.unet.norm_groups, paper.unet.attention_head_channels) == (256, 4, 32)
    ddpm, finetune = paper.ddpm, paper.finetune
    assert (ddpm.num_train_timesteps, ddpm.beta_start, ddpm.beta_end, ddpm.schedule) == (500, 1e-4, 0.02, "linear")
    assert (ddpm.batch_size, ddpm.accumulation, ddpm.accumulation_reduction, ddpm.min_timestep) == (4, 8, "sum", 1)
    assert (ddpm.clip.mode, ddpm.clip.limit, ddpm.augmentation.scale, ddpm.sampling) == ("value", 1.0, 0.0, "epoch")
    assert (finetune.learning_rate.ddpm, finetune.learning_rate.scratch, finetune.epochs) == (1e-5, 1e-4, 200)
    assert (finetune.learning_rate.imagenet, finetune.encoder) == (1e-4, "densenet161")
    assert (finetune.plateau_patience, finetune.early_stop_patience, finetune.clip.mode) == (13, 27, "none")
    assert (text.unet.blocks_per_level, text.unet.full_attention_sizes, text.unet.linear_attention) == (4, (32,), False)


@pytest.mark.parametrize(("values", "message"), [
    ({"ddpm": {"beta_start": 0.5}}, "ddpm.beta_start 0.5 must not be above ddpm.beta_end 0.02"),
    ({"evaluation": {"sdr_thresholds": [2, -1]}}, "sdr_thresholds.1: input should be greater than 0, got -1"),
])
def test_noise_that_falls_and_negative_thresholds_are_refused(values, message):
    with pytest.raises(UserError) as caught:
        parse_config(values, "a.json")
    assert message in str(caught.value)
    parse_config({"ddpm": {"beta_start": 0.02}, "evaluation": {"sdr_thresholds": [2, 2.5]}}, "a.json")

"""Values that no setting can have, found in the plain file: one line with the key, before anything is loaded."""

import json

import pytest

from core.config.load import load_config
from tests.conftest import error_of


@pytest.mark.parametrize(("text", "said"), [
    ('{"ddpm": {"learning_rate": Infinity}}', "ddpm.learning_rate: a finite number is needed, got inf"),
    ('{"ddpm": {"learning_rate": 1e999}}', "ddpm.learning_rate: a finite number is needed, got inf"),
    ('{"dataset": {"window": [0, NaN], "intensity": "window"}}', "dataset.window.1: a finite number is needed"),
    ('{"experiment": {"seed": 18446744073709551616}}', "experiment.seed: whole numbers lie within 64 bits"),
    ('{"experiment": {"seed": ' + "9" * 5000 + "}}", "limit (4300 digits)"),
    ('{"experiment": {"output_dir": "a\\u0000b"}}', "experiment.output_dir: 'a\\x00b' holds a character"),
    ('{"experiment": {"output_dir": "a\\ud800b"}}', "experiment.output_dir: 'a\\ud800b' holds a character"),
    ('{"extends": "\\u0000"}', "extends: '\\x00' holds a character"),
    ('{"dataset": ' * 30 + "1" + "}" * 30, "values are nested more than 20 deep"),
    ('{"dataset": ' + "[" * 1500 + "]" * 1500 + "}", "nested"),
    ('{"dataset": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deep"),
    ('{"experiment": {"name": "."}}', 'experiment.name "." is no name but a place'),
    ('{"experiment": {"name": ".."}}', 'experiment.name ".." is no name but a place'),
    ('{"experiment": {"name": "' + "ü" * 100 + '"}}', "experiment.name has 200 bytes"),
    ('{"dataset": {"name": ".."}}', 'dataset.name ".." is no name but a place'),
    ('{"experiment": {"device": "banana"}}', 'experiment.device "banana" is not supported; choose auto, cpu, cuda or'),
    ('{"experiment": {"device": "mps"}}', 'experiment.device "mps" is not supported'),
])
def test_no_setting_can_be(tmp_path, text, said):
    path = tmp_path / "study.json"
    path.write_text(text)
    line = error_of(load_config, path)
    assert said in line and str(path) in line and len(line) < 500


@pytest.mark.parametrize("given", ["ddpm.iterations=" + "9" * 5000, "ddpm.learning_rate=1e999",
                                   'experiment.output_dir="\\u0000"', "dataset.window=" + "[" * 100_000])
def test_no_override_can_be(tmp_path, given):
    (tmp_path / "study.json").write_text("{}")
    assert error_of(load_config, tmp_path / "study.json", [given]).startswith("--set")


def test_a_chain_of_files_ends(tmp_path):
    for number in range(1200):
        (tmp_path / f"{number}.json").write_text(json.dumps({"extends": f"{number + 1}.json"}))
    (tmp_path / "1200.json").write_text("{}")
    assert "extends through more than 50 files" in error_of(load_config, tmp_path / "0.json")
    assert load_config(tmp_path / "1160.json").is_3d is False


@pytest.mark.parametrize("name", ["auto", "cpu", "cuda", "cuda:3"])
def test_devices_of_any_machine_may_be_planned(tmp_path, name):
    (tmp_path / "study.json").write_text(json.dumps({"experiment": {"device": name, "seed": 2**62}}))
    assert load_config(tmp_path / "study.json").experiment.device == name

"""`pip install .`: what the wheel holds against the files of the checkout, and the installed copy used far from it."""

import json
import os
import shutil
import subprocess
import sys
import zipfile

import pytest

from tests.conftest import PROJECT

SHIPPED = ("core", "ddpm_pretraining", "ssl_baselines", "landmarks_finetuning", "study", "configs")
DATA = (".json", ".csv", ".css", ".html", ".js", ".j2")  # what the code opens of its own folders


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The unpacked wheel, made of a copy of the checkout: a build leaves files beside what it builds."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in SHIPPED:
        shutil.copytree(PROJECT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (PROJECT / "pyproject.toml", PROJECT / "README.md", *PROJECT.glob("requirements*.txt")):
        shutil.copy(path, folder / "source")
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps",
                    "--no-build-isolation", "--wheel-dir", str(folder), str(folder / "source")], check=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extractall(folder / "site")
    return folder / "site"


def test_every_module_and_every_file_that_it_reads_is_in_the_wheel(installed):
    wanted = {path.relative_to(PROJECT) for name in SHIPPED for path in (PROJECT / name).rglob("*")
              if path.suffix in (".py", *DATA)}
    there = {path.relative_to(installed) for path in installed.rglob("*") if path.suffix in (".py", *DATA)}
    assert {path for path in there if ".dist-info" not in str(path)} == wanted
    assert {path.name.split("-")[0] for path in installed.iterdir()} == {*SHIPPED, "few_shot_landmarks"}


def test_the_dependencies_are_the_pins_of_the_requirements(installed):
    [metadata] = installed.glob("*.dist-info/METADATA")
    lines = [line.removeprefix("Requires-Dist: ") for line in metadata.read_text().splitlines()
             if line.startswith("Requires-Dist: ")]
    pins = {name: [line.split("#")[0].strip() for line in (PROJECT / name).read_text().splitlines()]
            for name in ("requirements.txt", "requirements-export.txt")}
    assert lines == [*pins["requirements.txt"], *(f'{pin}; extra == "export"' for pin in
                                                  pins["requirements-export.txt"])]


def test_the_installed_copy_works_from_any_folder(installed, tmp_path):
    (tmp_path / "mine.json").write_text(json.dumps({"extends": "cpu.json", "experiment": {"name": "mine"}}))
    code = ("import core, core.files, core.config.load as load; from landmarks_finetuning.report.build import HERE; "
            "print(core.__file__); print(core.files.code_version()); "
            "print(load.load_config('mine.json').dataset.image_size, (HERE / 'page.css').is_file())")
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True,
                          check=True)
    where, version, rest = done.stdout.splitlines()
    assert where == str(installed / "core/__init__.py") and version == "few-shot-landmarks 0.1.0"
    assert rest == "(128, 128) True"

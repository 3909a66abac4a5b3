"""Files that others made say what they hold, never where this program writes."""

import json
import os
import shutil

import pandas as pd
import pytest
from safetensors import safe_open
from safetensors.torch import save_file

from core.config.dataset import Dataset
from core.data.source import load_source
from landmarks_finetuning.report.build import build_report
from tests.conftest import unsealed_header
from tests.landmarks_finetuning.report.test_report import write_run


@pytest.fixture
def foreign(tiny_cell, tmp_path):
    """foreign(key=value) -> a copy of the trained cell whose header and config.json say other things of the data."""

    def make(**dataset):
        run = tmp_path / "run"
        shutil.copytree(tiny_cell, run, ignore=shutil.ignore_patterns("evaluations"))
        path = run / "best.safetensors"
        with safe_open(path, framework="pt") as file:
            header = unsealed_header(file)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        header["config"]["dataset"] |= dataset
        save_file(tensors, path, metadata={"header": json.dumps(header)})
        config = json.loads((run / "config.json").read_text())
        config["dataset"] |= dataset
        (run / "config.json").write_text(json.dumps(config))
        return run

    return make


def test_a_header_does_not_say_where_images_are_kept(foreign, phantom, tmp_path, run_main):
    run, out = foreign(cache_dir=str(tmp_path / "theirs")), tmp_path / "out"
    image = phantom / "jpg" / "001.jpg"
    for more in ((), ("--set", "evaluation.batch_size=2")):
        assert run_main("landmarks_finetuning.predict", run, image, "--out", out, *more)[0] == 0
        assert run_main("landmarks_finetuning.evaluate", run, "--out", out, *more)[0] == 0
    assert not (tmp_path / "theirs").exists()
    asked = tmp_path / "asked"
    assert run_main("landmarks_finetuning.predict", run, image, "--out", out, "--set", f"dataset.cache_dir={asked}"
                    )[0] == 0
    assert len(list(asked.glob("*.npy"))) == 1


def test_a_header_makes_no_phantoms(foreign, tmp_path, run_main):
    root = tmp_path / "theirs" / "data"
    run = foreign(root=str(root), phantom={"count": 152, "size": [96, 78], "seed": 0})
    status, _, said = run_main("landmarks_finetuning.evaluate", run)
    assert status == 2 and said.count("\n") == 1 and str(root) in said and not root.parent.exists()


def test_a_header_draws_no_splits(foreign, phantom, tmp_path, run_main):
    """A folder that a header, or --data, names is read and never written into; the same splits are scored."""
    root = tmp_path / "theirs"
    names = [f"L{number}" for number in range(1, 20)]
    (root / "images").mkdir(parents=True)
    rows = ["image," + ",".join(f"{name}_x,{name}_y" for name in names)]
    for number in range(1, 9):
        shutil.copy(phantom / f"jpg/{number:03}.jpg", root / "images")
        lines = (phantom / f"400_senior/{number:03}.txt").read_text().splitlines()[:19]
        rows.append(f"{number:03}," + ",".join(lines))
    (root / "landmarks.csv").write_text("\n".join(rows) + "\n")
    (root / "dataset.json").write_text(json.dumps({"landmarks": names, "spacing_mm": 0.1,
                                                   "splits": {"train": 0.5, "test": 0.5, "seed": 0}}))
    run = foreign(root=str(root), layout="folder", phantom=None)
    with safe_open(run / "best.safetensors", framework="pt") as file:
        header = unsealed_header(file)
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    save_file(tensors, run / "best.safetensors", metadata={"header": json.dumps(header | {"landmark_names": names})})
    before = sorted(root.rglob("*"))
    for more in ((), ("--data", root)):
        out = tmp_path / f"out{len(more)}"
        status, said, error = run_main("landmarks_finetuning.evaluate", run, "--out", out, *more)
        assert (status, sorted(root.rglob("*"))) == (0, before), error
        assert said.startswith("4 test images")
    load_source(Dataset(root=str(root), image_size=(32, 32)))  # a study's own draws are kept
    kept = json.loads((root / "dataset.splits.json").read_text())[0]["splits"]["test"]
    assert sorted(set(pd.read_csv(tmp_path / "out0/predictions.csv", dtype=str)["image"])) == kept


def test_names_that_break_output(tiny_cell, phantom, tmp_path, run_main):
    """Bytes that are no UTF-8, as an old zip leaves them, and names as long as a file system allows."""
    folder = tmp_path / "new"
    folder.mkdir()
    for name in (os.fsdecode(b"M\xfcller.jpg"), "n" * 251 + ".jpg"):
        shutil.copy(phantom / "jpg/001.jpg", folder / name)
    status, _, error = run_main("landmarks_finetuning.predict", tiny_cell, folder, "--out", tmp_path / "out")
    assert status == 0, error
    images = set(pd.read_csv(tmp_path / "out/predictions.csv", encoding="utf8")["image"])
    assert images == {r"M\udcfcller.jpg", "n" * 251 + ".jpg"}
    assert len(list((tmp_path / "out/overlays").iterdir())) == 2


def test_a_name_in_metrics_makes_no_path(tmp_path):
    root = tmp_path / "runs" / "study"
    names = ("=cmd", "$x^{$")
    for backbone, errors in (("ddpm", [[1, 3], [2, 2]]), ("scratch", [[2, 4], [3, 3]])):
        run = write_run(root, backbone, 10, 0, errors, dataset="../../../../out/" + "n" * 300, landmark_names=names)
        table = pd.read_csv(run / "predictions.csv", dtype=str, keep_default_na=False)
        table["landmark"] = table["landmark"].map({"Sella": "'=cmd", "Nasion": "$x^{$"})
        table.to_csv(run / "predictions.csv", index=False)
    before = sorted(path for path in tmp_path.rglob("*"))
    page = build_report([root])
    made = [path for path in tmp_path.rglob("*") if path not in before]
    assert made and all(root / "report" in (path, *path.parents) for path in made)
    assert "$x^{$" in page.read_text() and list((page.parent / "figures").glob("*landmarks.png"))
    rows = pd.read_csv(page.parent / "tables/per_landmark.csv")
    assert set(rows["landmark"]) == {"'=cmd", "$x^{$"}

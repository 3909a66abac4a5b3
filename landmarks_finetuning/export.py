"""Write a trained detector as ONNX, with what its answers need in the file's metadata, and a script that runs it."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from core.config.second_stage import second_of
from core.errors import CommandParser, UserError, run_command
from core.runs.best import run_folder
from landmarks_finetuning.calibration import read_calibration
from landmarks_finetuning.inference import TrainedDetector, trained_detector
from landmarks_finetuning.refinement import window_of
from landmarks_finetuning.shape import SCALES, SCATTER
from landmarks_finetuning.uncertainty import Calibration

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
SCRIPT = Path(__file__).with_name("run_onnx.py")
DECODERS = ("local_expectation", "window_mass", "argmax", "component_centroid")  # that the script knows
TOLERANCE = 1e-4  # of the largest output, or of 1
LARGEST_FILE = 1 << 30  # bytes of weights in the file itself; a protobuf ends at twice that
BEFORE = (
    "One channel of raw intensities, upright, colours as BT.601 luminance. It is resampled to `size` (height, width) "
    "by a triangle filter as wide as an output pixel, pixel i of the image being (i + 0.5) * new / old - 0.5, then "
    "mapped to 0..1 by `intensity` (minmax, `percentiles` or `window`) and clipped.")
CROPS = (
    " The input is `crop` pixels of it about each answer of the first stage, the first pixel rounded and borders "
    "repeated; of a crop's maps only its own landmark's counts.")
AFTER = (
    "`maps` are raw: a softmax over pixels (or over landmarks, as `loss` says) makes them probabilities. `decoder` "
    "reads them in windows of `sigma` pixels. With `shape_prior` the labels' mean shape is fitted to the points, a "
    "Gaussian of width * size pixels about each fitted place is added to the maps in logarithms, and they are read "
    "again. `prior_px` is the width of the same about the first stage's answers. Expected errors are mean distances "
    "under maps to the power 1 / temperature, times `error_scale`. run_onnx.py does all this.")


def check_exportable(detector: TrainedDetector) -> None:
    """UserError, in one line, for what the file and its script cannot hold."""
    config, dataset = detector.recipe, detector.config.dataset
    where = f"{detector.path.parent} cannot be exported:"
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise UserError(f"export needs {', '.join(missing)}: pip install -r requirements-export.txt")
    if detector.kind.heatmaps is None:
        raise UserError(f'{where} the outputs of backbone "{detector.header["backbone"]}" are no heatmaps but votes of '
                        "patches; use landmarks_finetuning.Detector")
    if len(dataset.image_size) != 2:
        raise UserError(f"{where} it is for volumes, which have to be turned upright and resampled before; use "
                        "landmarks_finetuning.Detector")
    if dataset.makes_windows:
        key = "canvas_size" if dataset.resample_mm is None else "resample_mm"
        raise UserError(f"{where} with dataset.{key} an image is seen in overlapping windows; use "
                        "landmarks_finetuning.Detector")
    if config.finetune.decoder not in DECODERS:
        raise UserError(f'{where} finetune.decoder "{config.finetune.decoder}" is not in the script; choose another '
                        f"one by --set finetune.decoder=...: {', '.join(DECODERS)}")
    if config.evaluation.views > 1:
        raise UserError(f"{where} evaluation.views {config.evaluation.views} would need as many networks; give --set "
                        "evaluation.views=1")


def first_settings(detector: TrainedDetector, calibration: Calibration | None) -> dict[str, Any]:
    """What the script needs to know of the first stage, for JSON; sizes in (y, x), lengths in network pixels."""
    dataset, finetune, shape = detector.config.dataset, detector.recipe.finetune, detector.shape
    prior = None
    if shape is not None and finetune.shape_prior is not None:
        stored = shape.header()
        prior = {"width": finetune.shape_prior, "size": shape.size, "mean": stored["shape"],
                 "modes": stored.get("shape_modes"), "poses": stored.get("shape_poses"), "scales": SCALES,
                 "scatter": SCATTER}
    return {**_of_images(detector), "size": dataset.image_size, "loss": finetune.loss, "decoder": finetune.decoder,
            "sigma": detector.sigma, "shape_prior": prior, "calibration": _plain(calibration), "preprocessing": BEFORE,
            "postprocessing": AFTER}


def second_settings(detector: TrainedDetector, calibration: Calibration | None) -> dict[str, Any]:
    """The same of the second stage; its pixels are those of the finer images that its crops are cut out of."""
    second = second_of(detector.config, detector.header["backbone"])
    assert second is not None and detector.second is not None
    prior, finetune = detector.config.finetune.refine.prior, second.finetune
    return {**_of_images(detector), "size": second.dataset.whole_size, "crop": second.dataset.image_size,
            "loss": finetune.loss, "decoder": finetune.decoder, "sigma": window_of(detector.config),
            "prior_px": None if prior is None else prior * detector.second.header["spread_pixels"],
            "calibration": _plain(calibration), "preprocessing": BEFORE + CROPS, "postprocessing": AFTER}


def _of_images(detector: TrainedDetector) -> dict[str, Any]:
    dataset = detector.config.dataset
    return {"names": detector.landmark_names, "intensity": dataset.intensity, "percentiles": dataset.percentiles,
            "window": dataset.window, "spacing_mm": dataset.spacing_mm or detector.spacing_mm}


def _plain(calibration: Calibration | None) -> dict[str, Any] | None:
    if calibration is None:
        return None
    return {"temperatures": calibration.temperatures.tolist(), "error_scale": calibration.error_scale,
            "radius_scale": calibration.radius_scale}


@torch.no_grad()
def write_onnx(model: nn.Module, size: tuple[int, ...], settings: dict[str, Any], path: Path) -> float:
    """`model` as an ONNX file: `images` (B, 1, *size) -> `maps` (B, N, *size), any B; `settings` in its metadata.

    Very large weights lie in a second file, .onnx.data, beside it. Returns by how much onnxruntime's outputs are off
    torch's, at most, for random images; UserError above TOLERANCE, and then nothing is written.
    """
    import onnxruntime  # these are there for exports alone

    from landmarks_finetuning.run_onnx import find_checksum

    model, batch = model.cpu().float().eval(), torch.export.Dim("batch", min=1, max=4096)
    images = torch.rand((2, 1, *size), generator=torch.Generator().manual_seed(0))
    program = torch.onnx.export(model, (images,), dynamo=True, verbose=False, input_names=["images"],
                                output_names=["maps"], dynamic_shapes=({0: batch},))
    assert program is not None
    program.model.metadata_props.update(landmarks=json.dumps(settings), checksum="0" * 64)
    outside = sum(tensor.nbytes for tensor in model.state_dict().values()) > LARGEST_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-") as folder:
        made = Path(folder) / path.name
        program.save(str(made), external_data=outside)
        more = torch.cat((images, images[:1].flip(-1)))  # another number of images
        session = onnxruntime.InferenceSession(str(made), providers=["CPUExecutionProvider"])
        given, wanted = session.run(None, {"images": more.numpy()})[0], model(more).float().numpy()
        del session
        off = float(np.abs(given - wanted).max())
        if not off <= TOLERANCE * max(1.0, float(np.abs(wanted).max())):
            raise UserError(f"{path} was not written: onnxruntime's outputs are up to {off:.2g} from torch's")
        place, _, checksum = find_checksum(made)
        with made.open("r+b") as file:
            file.seek(place)
            file.write(checksum.encode())
        for part in sorted(Path(folder).iterdir(), reverse=True):  # the weights before what names them
            part.replace(path.parent / part.name)
    return off


def export(run_dir: Path, out: Path, overrides: Sequence[str] = (), others: Sequence[Path] = ()) -> list[Path]:
    """Write `out`, of two stages `out` with .fine.onnx as well, and run_onnx.py beside them; returns all files."""
    if out.suffix != ".onnx":
        raise UserError(f"--out {out}: must end in .onnx")
    run_dir, others = run_folder(run_dir), [run_folder(other) for other in others]
    detector = trained_detector(run_dir, overrides, others)
    check_exportable(detector)
    calibration = None if others else read_calibration(run_dir, detector)
    second, fine = detector.second, out.with_suffix(".fine.onnx")
    settings = first_settings(detector, calibration if second is None else None)
    written = [out]
    if second is not None:
        settings |= {"second_stage": fine.name}
        crops = second_settings(detector, calibration)
        off = write_onnx(second.model, crops["crop"], crops, fine)
        print(f"{fine}: onnxruntime is within {off:.1g} of torch")
        written.append(fine)
    off = write_onnx(detector.model, settings["size"], settings, out)
    print(f"{out}: onnxruntime is within {off:.1g} of torch")
    script = out.with_name(SCRIPT.name)
    shutil.copyfile(SCRIPT, script)
    return [*written, script]


def main() -> None:
    """Command line."""
    parser = CommandParser(
        prog="python -m landmarks_finetuning.export", description=__doc__,
        epilog="example: python -m landmarks_finetuning.export "
               "runs/cephalo/landmarks/ddpm/default/shots010_draw0_seed0 --out exported/model.onnx")
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--out", type=Path, required=True, metavar="MODEL.onnx")
    parser.add_argument("--with", type=Path, nargs="+", action="extend", default=[], metavar="RUN_DIR", dest="others",
                        help="runs on the same data whose heatmaps are averaged with those of run_dir, in the file")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="SECTION.KEY=VALUE")
    arguments = parser.parse_args()
    *_, script = export(arguments.run_dir, arguments.out, tuple(arguments.set), arguments.others)
    print(f"without torch: python {script} {arguments.out} IMAGE... --out predictions.csv")


if __name__ == "__main__":
    run_command(main)

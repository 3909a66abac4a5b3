"""The authors' published weights: list them, fetch one, convert one to safetensors."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from huggingface_hub import HfApi
from huggingface_hub.constants import ENDPOINT
from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers

from core.errors import CommandParser, UserError, did_you_mean, run_command
from core.networks.convert_weights import DTYPES, convert

REPOSITORY = "Roberto98/X-rays_Self-Supervised_Landmark_Detection"
COMMAND = "python -m core.networks.published_weights"
TIMEOUT_SECONDS = 5.0
EXAMPLE = "DDPM/chest/ema_model_epoch800_step6000.pt"


class PublishedFile(NamedTuple):
    """One file of the repository: path "METHOD/DATASET/...", size in bytes, sha256 where the server tells it."""

    path: str
    size: int
    sha256: str | None


def address(path: str) -> str:
    """Where `path` lies in the repository; the environment's HF_ENDPOINT may name a mirror."""
    return f"{ENDPOINT}/{REPOSITORY}/{path}"


def published_files(wanted: str) -> list[PublishedFile]:
    """All files below the repository's folders, by path; with no network a UserError at once names `wanted`, a URL."""
    with hub_errors(wanted):
        info = HfApi(endpoint=ENDPOINT).model_info(REPOSITORY, files_metadata=True, timeout=TIMEOUT_SECONDS)
    return sorted(PublishedFile(entry.rfilename, entry.size or 0, entry.lfs.sha256 if entry.lfs else None)
                  for entry in info.siblings or [] if "/" in entry.rfilename)


@contextmanager
def hub_errors(url: str, kept: str = "") -> Iterator[None]:
    """Turn what the hub's client raises into a UserError that says how to get `url` by hand."""
    by_hand = f"{kept}by hand: download {url} with a browser, then {COMMAND} convert FILE"
    try:
        yield
    except HfHubHTTPError as error:
        raise UserError(f"{ENDPOINT} answers {error.response.status_code} to {url}; {by_hand}") from None
    except (HTTPError, OfflineModeIsEnabled) as error:
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise UserError(f"{ENDPOINT} cannot be reached ({reason}); {by_hand}") from None


def list_files() -> None:
    """Print every published file by method and data set."""
    files = published_files(address("tree/main"))
    rows = [("method", "data set", "size", "path"), *((*_folders(file.path), readable(file.size), file.path)
                                                      for file in files)]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for method, dataset, size, path in rows:
        print(f"{method:<{widths[0]}}  {dataset:<{widths[1]}}  {size:>{widths[2]}}  {path}")
    print(f"{len(files)} files, {readable(sum(file.size for file in files))}; get one: {COMMAND} fetch PATH")


def _folders(path: str) -> tuple[str, str]:
    method, *rest = path.split("/")
    return method, rest[0] if len(rest) > 1 else "-"


def fetch(path: str, out: Path) -> Path:
    """Download `path` to out/path and return where it is; an interrupted download goes on where it stopped.

    The part's name holds the content's sha256, which is compared at the end. (The client's own download function
    starts from nothing after an interruption, hence its building block.)
    """
    url, target = address(f"resolve/main/{quote(path)}"), out / path
    files = {file.path: file for file in published_files(url)}
    if path not in files:
        raise UserError(f"{path} is not in {REPOSITORY}{did_you_mean(path, list(files))}; see {COMMAND} list")
    file = files[path]
    if target.is_file() and target.stat().st_size == file.size:
        return target
    part = target.with_name(f".{target.name}.{(file.sha256 or 'unknown')[:12]}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with hub_errors(url, f"what came is kept in {part}, the same command goes on from there; or "), \
                part.open("ab") as opened:
            http_get(url, opened, resume_size=opened.tell(), headers=build_hf_headers(),
                     expected_size=file.size or None, displayed_filename=path)
        _check_sha256(part, file)
        part.replace(target)
    except OSError as error:
        reason = error.strerror or str(error).splitlines()[0]
        raise UserError(f"{part} cannot be completed: {reason}; the same command goes on from what is there") from None
    return target


def _check_sha256(part: Path, file: PublishedFile) -> None:
    with part.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    if file.sha256 not in (None, digest):
        part.unlink()
        raise UserError(f"{file.path} was damaged on the way (its sha256 is {digest}, not {file.sha256}): removed, "
                        "fetch it again")


def readable(size: int) -> str:
    """Bytes for people: 2234 kB, 107.1 MB, 2.2 GB (powers of 1000, as the repository's page counts)."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size / 1000:.0f} kB"


def convert_file(source: Path, out: Path | None, dtype: str) -> None:
    """Convert and say what came out and how to use it."""
    out = out or source.with_suffix(".safetensors")
    header = convert(source, out, dtype)
    print(f"{out} ({readable(out.stat().st_size)}, {dtype}), iteration {header['iteration']}: ", end="")
    if header["kind"] == "encoder":
        print(f"encoder {header['encoder']} for {header['channels']} channels")
    else:
        print(f"U-Net, unet.base_channels {header['config']['unet']['base_channels']}; fine-tune it with "
              f"--set finetune.checkpoint={out}")


def main() -> None:
    """Command line."""
    parser = CommandParser(
        prog=COMMAND, description=__doc__,
        epilog=f"example: {COMMAND} fetch {EXAMPLE} && {COMMAND} convert weights/{EXAMPLE} --dtype float16")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help=f"the files in {address('tree/main')}, with sizes")
    fetching = commands.add_parser("fetch", help="download one of them, or go on with a download")
    fetching.add_argument("path", metavar="PATH", help=f"as list shows it, for example {EXAMPLE}")
    fetching.add_argument("--out", type=Path, default=Path("weights"), metavar="FOLDER", help="default: %(default)s")
    converting = commands.add_parser("convert", help="turn a published pickle into safetensors")
    converting.add_argument("file", type=Path, metavar="FILE", help="a published .pt or .pth")
    converting.add_argument("--out", type=Path, metavar="FILE.safetensors", help="default: beside FILE")
    converting.add_argument("--dtype", choices=list(DTYPES), default="float32",
                            help="half the size as float16 or bfloat16; loaded as float32 (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.command == "list":
        list_files()
    elif arguments.command == "fetch":
        fetched = fetch(arguments.path, arguments.out)
        print(f"{fetched} ({readable(fetched.stat().st_size)}); convert it: {COMMAND} convert {fetched}")
    else:
        convert_file(arguments.file, arguments.out, arguments.dtype)


if __name__ == "__main__":
    run_command(main)

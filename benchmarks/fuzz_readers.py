"""Readers fed with mutated files until a time is up: an answer, or one line that names the file, and nothing else.

Each mutation follows its number: one number, one file. Mutations overwrite, insert,
remove and repeat bytes, set numbers to extreme ones, cut, and swap pieces between files of the same kind.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.bed import STUDY, VOLUMES, write_hand, write_pictures, write_volumes
from benchmarks.predict_suite import write_detector
from core.config.dataset import Dataset
from core.config.load import load_config
from core.data.cache import check_size
from core.data.folder_layout import read_description
from core.errors import CommandParser, UserError, run_command
from core.files import write_json
from core.formats.images import read_geometry, read_image
from core.formats.label_files import FORMATS, IN_SPACE, Images, read_label_file, resolved, write_label_file
from landmarks_finetuning.inference import WEIGHTS, TrainedDetector

SECONDS, BYTES, SHOWN = 20, 8 * 2**30, 20
MOST_MIB = 1024  # that one file may take
EXTREME = (b"\x00\x00\x00\x00", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\x00\x00\x00\x80",
           b"-1", b"1e999", b"NaN", b"99999999999999999999", b"null", b"[[[[", b"\x00", b"\xed\xa0\x80", b'"')


def mutated(content: bytes, other: bytes, rng: random.Random) -> bytes:
    """One to six changes of `content`, some with pieces of `other`."""
    whole = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        if not whole:
            break
        head = rng.random() < 0.6  # most of what can go wrong stands in headers
        place = rng.randrange(min(len(whole), 600) if head else len(whole))
        piece = rng.randrange(1, 17)
        match rng.randrange(7):
            case 0:
                whole[place] ^= 1 << rng.randrange(8)
            case 1:
                whole[place:place + piece] = rng.randbytes(piece)
            case 2:
                word = rng.choice(EXTREME)
                whole[place:place + len(word)] = word
            case 3:
                del whole[place:place + piece]
            case 4:
                whole[place:place] = whole[place:place + 16 * piece]
            case 5:
                del whole[max(place, 1):]
            case _:
                start = rng.randrange(max(1, len(other)))
                whole[place:place + piece] = other[start:start + piece]
    return bytes(whole)


def read_picture(path: Path) -> None:
    """Geometry, its size against dataset.max_megapixels, then pixels, as every command does."""
    size = read_geometry(path).size
    check_size(path, size, Dataset(root="data", image_size=(8,) * len(size)))
    read_image(path)


def readers(root: Path) -> list[tuple[Path, Callable[[Path], Any]]]:
    """A sound file of each kind below `root`, and what reads it."""
    os.chdir(root)
    write_pictures(Path("data"))
    write_volumes(Path("volumes"))
    write_hand(Path("hand"))
    table, images = Path("data/landmarks.csv"), Images(Path("data/images"))
    labels = resolved(read_label_file(table, images=images), images, table)
    pictures = [*sorted(Path("data/images").iterdir())[:7], *sorted(Path("volumes/images").glob("*.n*")),
                *sorted(Path("volumes/images/c3").iterdir())[:1]]
    kinds: list[tuple[Path, Callable[[Path], Any]]] = [(path, read_picture) for path in pictures]
    for kind in FORMATS:
        path = Path("labels") / FORMATS[kind].place
        if kind not in IN_SPACE:
            write_label_file(path, labels, kind, images)
            names = list(labels.names) if kind == "tps" else None
            file = sorted(path.iterdir())[0] if path.is_dir() else path  # of LabelMe's one a picture
            kinds.append((file, lambda path, names=names: read_label_file(path, names, images)))  # type: ignore[misc]
    for path in sorted(Path("volumes/landmarks").iterdir())[-2:]:
        kinds.append((path, lambda path: read_label_file(path, None, Images(Path("volumes/images")))))
    for name, values in (("study", STUDY), ("volumes", VOLUMES)):
        write_json(Path(f"{name}.json"), values)
        kinds.append((Path(f"{name}.json"), load_config))
    kinds.append((Path("data/dataset.json"), read_description))
    size = argparse.Namespace(side=16, base=8, device="cpu")
    Path("run").mkdir()
    kinds.append((write_detector(Path("run"), size, None, ["a", "b"]) / WEIGHTS, TrainedDetector))
    return kinds


def tried(number: int, kinds: list[tuple[Path, Callable[[Path], Any]]], contents: list[bytes]) -> tuple[str, str]:
    """Mutation `number` read: "read", "refused", or what is wrong with how it ended, and the words of it."""
    rng = random.Random(number)
    index = rng.randrange(len(kinds))
    source, read = kinds[index]
    alike = [i for i, (path, _) in enumerate(kinds) if path.suffix == source.suffix]
    path = source.with_name(f"fuzzed{''.join(source.suffixes)}")
    path.write_bytes(mutated(contents[index], contents[rng.choice(alike)], rng))
    signal.alarm(SECONDS)
    before = _peak_mib()
    try:
        read(path)
        if _peak_mib() - before > MOST_MIB:
            return "memory", f"took {_peak_mib() - before:.0f} MiB"
    except UserError as error:
        return ("refused", "") if "fuzzed" in str(error) and "\n" not in str(error) else ("unnamed", str(error))
    except TimeoutError as error:
        return "hang", str(error)
    except Exception as error:  # noqa: BLE001  what is looked for
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        where = "" if trace is None else f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"
        return "traceback", f"{type(error).__name__}: {error} ({where})"
    finally:
        signal.alarm(0)
        path.unlink()
    return "read", ""


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _late(*_: object) -> None:
    raise TimeoutError(f"took more than {SECONDS} s")


def main() -> None:
    """Command line."""
    parser = CommandParser(prog="python -m benchmarks.fuzz_readers", description=__doc__,
                           formatter_class=argparse.RawDescriptionHelpFormatter,
                           epilog="example: python -m benchmarks.fuzz_readers --seconds 600")
    parser.add_argument("--seconds", type=float, default=60, help="when to stop, counted in CPU time")
    parser.add_argument("--first", type=int, default=0, help="number of the first mutation")
    parser.add_argument("--count", type=int, help="how many, at most")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, _late)
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    counts: Counter[str] = Counter()
    seen: set[str] = set()
    with tempfile.TemporaryDirectory() as folder:
        kinds = readers(Path(folder))
        contents = [path.read_bytes() for path, _ in kinds]
        start, number = time.process_time(), arguments.first
        while time.process_time() - start < arguments.seconds and (
                arguments.count is None or number < arguments.first + arguments.count):
            verdict, said = tried(number, kinds, contents)
            counts[verdict] += 1
            kind = f"{verdict} {kinds[random.Random(number).randrange(len(kinds))][0]} {said[-60:]}"
            if said and kind not in seen and len(seen) < SHOWN:
                seen.add(kind)
                print(f"{number}: {kinds[random.Random(number).randrange(len(kinds))][0]}: {verdict}: {said[:400]}",
                      flush=True)
            number += 1
        os.chdir("/")
    print(f"{number - arguments.first} mutations of {len(kinds)} files in {time.process_time() - start:.0f} s of CPU: "
          f"{dict(counts)}; peak {_peak_mib():.0f} MiB")
    if counts.keys() - {"read", "refused"}:
        sys.exit(1)


if __name__ == "__main__":
    run_command(main)

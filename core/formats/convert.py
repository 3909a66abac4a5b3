"""Turn landmarks of one tool into those of another: COCO, LabelMe, CVAT, Label Studio, TPS, Slicer, tables."""

from __future__ import annotations

import sys
from pathlib import Path

from core.errors import CommandParser, UserError, run_command
from core.files import atomic_folder
from core.formats.label_files import FORMATS, Images, gaps, lost, outside, read_label_file, resolved, write_label_file

BY_SUFFIX = {".csv": "wide", ".xml": "cvat", ".tps": "tps", ".mrk.json": "slicer", ".fcsv": "fcsv"}


def convert(source: Path, target: Path, kind: str | None = None, target_kind: str | None = None,
            folder: Path | None = None, names: list[str] | None = None) -> list[str]:
    """Read `source`, write `target`, which must not exist, and return in words what to know of it: notes for stderr.

    Those are what is lost on the way, landmarks that lie beside their image, and images that lack some.

    `folder` holds the images; where it is given, every image must be there and is called by its path below it.
    UserError: as the reader and the writer, a format that is not clear, a target that is there.
    """
    if target.exists():
        raise UserError(f"{target} is there already; remove it or name another")
    target_kind = target_kind or _kind_of_target(target)
    images = Images(folder)
    labels = read_label_file(source, names, images, kind)
    if folder is not None:
        labels = resolved(labels, images, source)
    folder_of_files = not Path(FORMATS[target_kind].place).suffix and not target.name.endswith((".mrk.json", ".fcsv"))
    if folder_of_files:
        with atomic_folder(target) as part:  # all of them or none
            write_label_file(part, labels, target_kind, images)
    else:
        write_label_file(target, labels, target_kind, images)
    gone = [f"{target_kind} cannot hold {', '.join(said)}"] if (said := lost(labels, target_kind)) else []
    gone += [f"{source} also has {', '.join(labels.passed_over)}"] if labels.passed_over else []
    beside, lacking = outside(labels), gaps(labels)
    return [*([f"not in {target}: {'; '.join(gone)}"] if gone else []),
            *([f"{source}: {len(beside)} landmarks lie outside their image, such as {beside[0]}"] if beside else []),
            *([f"{source}: {len(lacking)} of {len(labels.rows)} images lack landmarks that others have, such as "
               f"{lacking[0]}"] if lacking else [])]


def _kind_of_target(path: Path) -> str:
    kind = next((kind for suffix, kind in BY_SUFFIX.items() if path.name.lower().endswith(suffix)), None)
    if kind is None:
        raise UserError(f"{path}: its name does not tell the format; give --to, one of {', '.join(FORMATS)}")
    return kind


def main() -> None:
    """Command line."""
    parser = CommandParser(
        prog="python -m core.formats.convert", description=__doc__,
        epilog="example: python -m core.formats.convert annotations.xml landmarks.csv --images images/")
    parser.add_argument("source", type=Path, metavar="IN", help="a file, or LabelMe's or 3D Slicer's folder of files")
    parser.add_argument("target", type=Path, metavar="OUT", help="a file, or for labelme, slicer and fcsv a folder")
    parser.add_argument("--from", choices=tuple(FORMATS), dest="kind", help="what IN is (told by suffix and content)")
    parser.add_argument("--to", choices=tuple(FORMATS), dest="target_kind",
                        help=f"what OUT becomes (told by {', '.join(BY_SUFFIX)})")
    parser.add_argument("--images", type=Path, metavar="DIR",
                        help="the images, where a format needs their size or place; names and sizes are then checked")
    parser.add_argument("--names", nargs="+", metavar="NAME", help="the landmarks and their order; TPS has no names")
    given = parser.parse_args()
    for note in convert(given.source, given.target, given.kind, given.target_kind, given.images, given.names):
        print(f"note: {note}", file=sys.stderr)
    print(f"landmarks in {given.target}")


if __name__ == "__main__":
    run_command(main)

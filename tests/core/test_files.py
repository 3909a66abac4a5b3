"""Stamps of files and folders: another stamp, another content; what is half written is never seen, nor left."""

import os
from pathlib import Path

import pytest

from core.files import atomic_folder, hold, stamp, walk, write_atomically


def test_stamp_of_a_folder_is_that_of_its_files(tmp_path, monkeypatch):
    root = tmp_path / "data"
    for name, content in (("b/one.png", b"1"), ("a.txt", b"22"), ("b/c/.hidden", b"333")):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
        os.utime(root / name, ns=(5, 7))
    (root / "link").symlink_to(root / "a.txt")
    (root / "nowhere").symlink_to(root / "gone")
    (root / "linked").symlink_to(root / "b", target_is_directory=True)
    expected = {(str(root / "a.txt"), 2, 7), (str(root / "b/c/.hidden"), 3, 7), (str(root / "b/one.png"), 1, 7),
                (str(root / "link"), 2, 7)}
    assert set(stamp(root)) == expected and list(stamp(root)) == sorted(expected)
    assert stamp(root / "a.txt") == ((str(root / "a.txt"), 2, 7),)
    assert stamp(root / "gone") == stamp(root / "a.txt/none") == ()
    monkeypatch.chdir(root)
    assert stamp(Path("a.txt")) == stamp(root / "a.txt") and set(stamp(Path())) >= {stamp(Path("b/one.png"))[0]}


def test_a_stamp_notices_what_changes(tmp_path):
    (tmp_path / "a").write_bytes(b"1")
    before = stamp(tmp_path)
    os.utime(tmp_path / "a", ns=(1, 2))
    assert stamp(tmp_path) != before
    (tmp_path / "b").write_bytes(b"")
    assert len(stamp(tmp_path)) == 2


def test_a_walk_follows_no_link_to_a_folder(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "one/file").touch()
    (tmp_path / "one/back").symlink_to(tmp_path, target_is_directory=True)
    assert sorted(entry.name for entry in walk(tmp_path)) == ["back", "file", "one"]


def left_behind(folder, name):
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"half")
    os.utime(folder / name, (0, 0))
    return folder / name


def test_who_writes_into_a_folder_clears_what_killed_writers_left_there(tmp_path):
    """Whichever command it is; other files, and what a process holds, stay."""
    left = left_behind(tmp_path, ".other.csv.0123456789abcdef.tmp")
    mine = left_behind(tmp_path, ".hidden.tmp")
    held = left_behind(tmp_path, ".held.csv.0123456789abcdef.tmp")
    below = left_behind(tmp_path / "below", left.name)
    with held.open("rb") as file:
        assert hold(file.fileno())
        write_atomically(tmp_path / "new.csv", b"whole")
    assert not left.exists() and mine.exists() and held.exists() and below.exists()
    assert (tmp_path / "new.csv").read_bytes() == b"whole"


def test_a_folder_appears_when_it_is_complete(tmp_path):
    left = tmp_path / ".new.partial-0123456789abcdef"
    left_behind(left, "file")
    os.utime(left, (0, 0))
    with pytest.raises(KeyError), atomic_folder(tmp_path / "new") as part:
        (part / "file").touch()
        assert not (tmp_path / "new").exists()
        raise KeyError
    assert not list(tmp_path.iterdir())
    with atomic_folder(tmp_path / "new") as part:
        (part / "file").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["new", "file"]
    with pytest.raises(OSError), atomic_folder(tmp_path / "new") as part:
        (part / "other").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["new", "file"]

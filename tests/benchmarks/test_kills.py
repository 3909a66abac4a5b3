"""The driver that kills notices what it is there for: each fault is made once, in small commands of the test."""

import json
import os
import random
import signal
import sys
import time
import types
from pathlib import Path

import pytest

from benchmarks import kills
from benchmarks.killing import Child, State, Strike, children, contents, left_over, orphans, same

NAME = "tests_killed_command"


@pytest.fixture
def command(monkeypatch, tmp_path):
    """command(main): a module of this main for a Child to run."""
    monkeypatch.chdir(tmp_path)

    def make(main):
        module = types.ModuleType(NAME)
        module.main = main
        monkeypatch.setitem(sys.modules, NAME, module)
        return NAME

    return make


def write_three():
    for name in "abc":
        Path(name).write_text(name)
        Path(name).rename(name * 2)


@pytest.mark.parametrize("writes, left", [
    (1, ["log"]), (2, ["a", "log"]), (3, ["aa", "log"]), (6, ["aa", "bb", "c", "log"])])
def test_a_strike_comes_before_the_write_it_counts(command, tmp_path, writes, left):
    ended = Child(tmp_path / "log", command(write_three), strikes=[Strike("", writes, 0)]).wait()
    assert ended.killed and sorted(path.name for path in tmp_path.iterdir()) == left


def test_who_is_not_struck_is_counted(command, tmp_path):
    ended = Child(tmp_path / "log", command(write_three)).wait()
    assert (ended.status, ended.writes) == (0, 6)


def test_a_strike_by_time(command, tmp_path):
    ended = Child(tmp_path / "log", command(lambda: time.sleep(30)), strikes=[Strike("", 0, 0.05)]).wait()
    assert ended.killed


def test_what_takes_too_long_is_ended(command, tmp_path):
    assert Child(tmp_path / "log", command(lambda: time.sleep(30))).wait(0.1).status is None


def test_what_is_left_and_what_is_compared(tmp_path):
    names = (".a.csv.0123456789abcdef.tmp", ".b.partial-0123456789abcdef", "claim.lock", "sound.csv", "logs")
    for name in names:
        (tmp_path / name).mkdir() if name in ("logs", names[1]) else (tmp_path / name).write_text("x")
    (tmp_path / "logs/worker1.log").write_text("1")
    (tmp_path / "m.jsonl").write_text('{"step": 1, "seconds": 2}\n')
    assert sorted(Path(path).name for path in left_over(tmp_path)) == sorted(names[:3])
    found = contents(tmp_path)
    assert found[str(tmp_path / "m.jsonl")] == [{"step": 1}] and str(tmp_path / "logs/worker1.log") not in found


def test_an_older_state_is_no_other_state():
    assert same(State(2, 5), State(4, 7)) and same(State(4, 7), State(4, 7))
    assert not same(State(4, 5), State(4, 7)) and not same(b"a", b"b")
    more = [{"step": 2}, {"step": 3}, {"step": 4}]
    assert same(more, more[::2]) and not same(more, [{"step": 1}]) and not same(more[:2], more[::2])


@pytest.fixture
def killing(tmp_path, monkeypatch):
    """Kills of a command whose results are the folder `out`."""
    (tmp_path / "bed").mkdir()
    monkeypatch.setitem(kills.KINDS, "test", kills.Kind((NAME,), 1, ("out",)))
    monkeypatch.setattr(kills, "JUST_SECONDS", 0)
    killing = kills.Killing("test", tmp_path / "bed", tmp_path / "work", random.Random(0))
    yield killing
    os.chdir(tmp_path)


def faults(killing):
    return {name: count for name, count in killing.counts.items() if name in kills.FAULTS}


def good():
    Path("out").mkdir(exist_ok=True)
    for name in "abcdefgh":
        Path(f"out/{name}.json").write_text(json.dumps({"time": time.time(), "value": name}))


def test_a_sound_command_has_no_faults(command, killing, monkeypatch, tmp_path):
    command(good)
    monkeypatch.setattr(killing, "strikes", lambda whole: [Strike("", 4, 0)])
    killing.one((NAME,), 7, float("inf"))
    assert killing.counts["kills"] == 7 and not faults(killing)
    killing.one((NAME,), 7, 0)  # the time is up: nobody is struck any more
    assert killing.counts["kills"] == 7 and not faults(killing)


@pytest.mark.parametrize("fault", kills.FAULTS)
def test_each_fault_is_counted(command, killing, fault, monkeypatch, tmp_path):
    """Where the command was begun before: loses a file, writes another, refuses, leaves one behind, or raises."""

    def bad():
        before = Path("begun").exists()
        Path("begun").write_text("")
        if before and fault == "stuck":
            print("error: begun is there", file=sys.stderr)
            raise SystemExit(2)
        if before and fault == "traceback":
            raise ValueError
        good()
        if before and fault == "lost":
            Path("out/a.json").unlink()
        if before and fault == "mismatched":
            Path("out/a.json").write_text("{}")
        if before and fault == "left over":
            Path("out/.a.json.0123456789abcdef.tmp").write_text("half")

    command(bad)
    monkeypatch.setattr(killing, "strikes", lambda whole: [Strike("", 5, 0)])
    killing.one((NAME,), 1, float("inf"))
    assert killing.counts["kills"] == 1 and faults(killing).get(fault)


def test_orphans_are_counted_and_ended(monkeypatch):
    monkeypatch.setattr("benchmarks.killing.PATIENCE_SECONDS", 0.05)
    own = children()
    pid = os.fork()
    if pid == 0:
        signal.pause()
        os._exit(0)
    assert orphans(own) == 1 and orphans(own) == 0

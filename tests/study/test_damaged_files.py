"""Damaged files of one run: the launch goes on with the others, and says what is damaged."""

import pytest

from core.config.load import parse_config
from core.errors import DamagedFile
from core.runs.identity import check_cell
from core.runs.places import Cell, cell_dir
from study.prepare import CHECKED, check_done, remember, remembered
from study.runner import settled
from study.runs import cell_run
from study.scoring import Failure

DAMAGE = [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000, b'{"message"']


@pytest.fixture
def config(tmp_path):
    return parse_config({"experiment": {"name": "a", "output_dir": str(tmp_path)},
                         "finetune": {"backbones": ["scratch"], "shots": [1, 2], "draws": [0]}}, "a.json")


@pytest.mark.parametrize("content", DAMAGE)
def test_failed_json(config, content):
    """Says that it is damaged; the run is tried again."""
    run = cell_run(config, Cell("scratch", 1, 0, 0))
    assert run.failure() is None
    run.folder.mkdir(parents=True)
    run.failure_path.write_bytes(content)
    assert "failed.json is damaged" in run.failure() and "\n" not in run.failure() and not run.done


@pytest.mark.parametrize("content", DAMAGE)
def test_config_json(config, content, capsys):
    """Noted before anything is run; the run itself would fail by it."""
    cell = Cell("scratch", 1, 0, 0)
    folder = cell_dir(config, cell)
    folder.mkdir(parents=True)
    (folder / "config.json").write_bytes(content)
    check_done(config, ("finetune",))
    assert capsys.readouterr().err.startswith(f"note: {folder / 'config.json'} is damaged")
    with pytest.raises(DamagedFile):
        check_cell(config, cell)


@pytest.mark.parametrize("content", [*DAMAGE, b"{}", b'{"stamp": "x"}', b'{"stamp": "x", "runs": 3}'])
def test_memo_of_the_checked_data(tmp_path, content):
    (tmp_path / CHECKED).write_bytes(content)
    assert remembered(tmp_path, "x") == set()
    remember(tmp_path, "x", [])


def test_failure_on_a_full_disk(config, monkeypatch):
    """failed.json cannot be written: the run is failed all the same, and the launch goes on."""
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("study.runner.write_json", full)
    run = cell_run(config, Cell("scratch", 1, 0, 0))
    assert settled(run, Failure("OSError: No space left on device")) == "OSError: No space left on device"

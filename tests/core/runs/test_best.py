"""The link to the best run: replaced in one step, a file where links cannot be made, followed from the experiment."""

from pathlib import Path

import pytest

from core.errors import UserError
from core.runs import best
from core.runs.best import point_to_best, run_folder


@pytest.fixture
def experiment(tmp_path):
    for name in ("a", "b"):
        folder = tmp_path / "study/landmarks/ddpm/default" / f"shots001_draw0_seed0_{name}"
        folder.mkdir(parents=True)
        (folder / "best.safetensors").touch()
    return tmp_path / "study"


def runs_of(experiment):
    return sorted(experiment.glob("landmarks/*/*/*"))


def refuse_links(*_, **__):
    raise PermissionError("links are not permitted here")


@pytest.mark.parametrize("links", [True, False])
def test_it_leads_from_the_experiment_to_the_run_also_when_moved(experiment, monkeypatch, links):
    if not links:
        monkeypatch.setattr(Path, "symlink_to", refuse_links)
    for run in (*runs_of(experiment), runs_of(experiment)[1]):
        pointer = point_to_best(experiment, run)
        assert pointer.is_symlink() == links
        assert run_folder(experiment).samefile(run) and run_folder(pointer).samefile(run)
    moved = experiment.rename(experiment.with_name("moved"))
    assert run_folder(moved).samefile(runs_of(moved)[1])
    assert sorted(path.name for path in moved.iterdir()) == ["best", "landmarks"]  # no temporary file is left


def test_a_link_takes_the_place_of_a_file_and_back(experiment, monkeypatch):
    first, second = runs_of(experiment)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "symlink_to", refuse_links)
        point_to_best(experiment, first)
    assert point_to_best(experiment, second).is_symlink() and run_folder(experiment).samefile(second)
    monkeypatch.setattr(Path, "symlink_to", refuse_links)
    assert point_to_best(experiment, first).is_file() and run_folder(experiment).samefile(first)


def test_readers_never_find_it_missing(experiment, monkeypatch):
    """At the moment of the replacement the old one is still there."""
    first, second = runs_of(experiment)
    point_to_best(experiment, first)
    seen, replace = [], Path.replace

    def watched(self, target):
        seen.append(run_folder(experiment).samefile(first))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", watched)
    point_to_best(experiment, second)
    assert seen == [True] and run_folder(experiment).samefile(second)


def test_what_is_no_experiment_is_given_back(experiment, tmp_path):
    run = runs_of(experiment)[0]
    assert run_folder(run) == run and run_folder(tmp_path / "nowhere") == tmp_path / "nowhere"


def test_weights_stand_for_their_run(experiment):
    run = runs_of(experiment)[0]
    assert run_folder(run / "best.safetensors") == run
    (run / "last.pt").write_bytes(b"")
    with pytest.raises(UserError, match="last.pt is a file; name a run's folder, or the best.safetensors in it"):
        run_folder(run / "last.pt")


def test_mistakes_are_named(experiment):
    run = runs_of(experiment)[0]
    with pytest.raises(UserError, match=rf"study has no best run: .* such as {run}$"):
        run_folder(experiment)
    point_to_best(experiment, run)
    (run / "best.safetensors").unlink()
    run.rmdir()
    with pytest.raises(UserError, match="best leads to .*_a, which is not there"):
        run_folder(experiment)
    (experiment / best.BEST).unlink()
    (experiment / best.BEST).mkdir()
    with pytest.raises(UserError, match="best is a folder, not the link"):
        point_to_best(experiment, run)

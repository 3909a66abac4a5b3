"""Rules that the source must keep: who may import whom, and what no file does."""

import ast

import pytest

from tests.conftest import PROJECT

STAGES = ("ddpm_pretraining", "landmarks_finetuning", "ssl_baselines")
FOLDERS = (*STAGES, "core", "study", "benchmarks", "tests")
SOURCES = sorted(path for folder in FOLDERS for path in (PROJECT / folder).rglob("*.py"))


def imported(path):
    """Top-level packages that a file imports, wherever in it, also by name through import_module or __import__."""
    return packages(ast.parse(path.read_text(encoding="utf8")))


def packages(tree):
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module.split(".")[0])
        elif isinstance(node, ast.Call) and called(node) in ("import_module", "__import__"):
            found |= {str(a.value).split(".")[0] for a in node.args if isinstance(a, ast.Constant)}
    return found


def called(node):
    """The last name of what is called: torch.load -> load."""
    return getattr(node.func, "attr", getattr(node.func, "id", None))


def unsafe_loads(tree):
    """Lines of torch.load without a literal weights_only=True."""
    return [node.lineno for node in ast.walk(tree)
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"
            and not any(k.arg == "weights_only" and getattr(k.value, "value", None) is True for k in node.keywords)]


def broad_handlers(tree):
    """Lines of `except:`, `except Exception` and `except BaseException`."""
    return [node.lineno for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler)
            and (node.type is None or any(getattr(n, "id", "") in ("Exception", "BaseException")
                                          for n in ast.walk(node.type)))]


def test_sources_are_found():
    assert len([path for path in SOURCES if path.relative_to(PROJECT).parts[0] == "core"]) > 10
    assert {path.relative_to(PROJECT).parts[0] for path in SOURCES} >= {*STAGES[:2], "core", "tests"}


@pytest.mark.parametrize("stage", STAGES)
def test_stages_never_import_each_other(stage):
    others = {*STAGES, "benchmarks", "tests"} - {stage}
    for path in (PROJECT / stage).rglob("*.py"):
        assert not imported(path) & others, path


def test_core_imports_no_stage():
    for path in (PROJECT / "core").rglob("*.py"):
        assert not imported(path) & {*STAGES, "benchmarks", "tests"}, path


def test_datasets_is_no_package_and_no_file_is_named_utils():
    assert not (PROJECT / "datasets/__init__.py").exists()
    assert not [path for path in SOURCES if path.stem in ("utils", "util", "helpers", "common", "misc")]


def test_pickles_are_read_with_weights_only_and_nothing_is_swallowed():
    """One handler may be broad: where the launcher reports a run that failed and goes on with the next."""
    for path in SOURCES:
        tree = ast.parse(path.read_text(encoding="utf8"))
        reporting = path == PROJECT / "study/runner.py"
        assert not unsafe_loads(tree) and len(broad_handlers(tree)) == reporting, path


def test_the_rules_can_fail():
    bad = ast.parse("def f():\n import ssl_baselines.views\n import_module('core.errors')\n from tests.a import b\n"
                    " torch.load(p)\n torch.load(p, weights_only=False)\n torch.load(p, weights_only=True)\n"
                    " try: pass\n except (OSError, Exception): pass\n except ValueError: pass\n")
    assert packages(bad) == {"ssl_baselines", "core", "tests"}
    assert unsafe_loads(bad) == [5, 6] and broad_handlers(bad) == [9]

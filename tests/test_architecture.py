"""Rules that the source must keep: the floors of the house, who may import whom, and what no file does."""

import ast
import re

import pytest

from core.config.starts import BACKBONES
from tests.conftest import PROJECT

STAGES = ("ddpm_pretraining", "landmarks_finetuning", "ssl_baselines")
GROUND = {"core.errors", "core.files", "core.background", "core.bounds"}
# from the ground up: a room and the rooms that it may import beside itself; docs/design.md says what each is for
ARROWS = {
    "core.errors": set(),
    "core.files": set(),
    "core.background": set(),
    "core.bounds": {"core.errors"},
    "core.config": GROUND,
    "core.formats": GROUND,
    "core.phantoms": {*GROUND, "core.formats"},
    "core.data": {*GROUND, "core.config", "core.formats", "core.phantoms"},
    "core.networks": {*GROUND, "core.config", "core.formats"},
    "core.training": {*GROUND, "core.config", "core.formats", "core.networks"},
    "core.runs": {*GROUND, "core.config", "core.formats", "core.data"},
}
CORE = set(ARROWS)
ARROWS |= dict.fromkeys(STAGES, CORE)
ARROWS |= {"study": {*CORE, *STAGES}, "benchmarks": {*CORE, *STAGES, "study"}}
INSIDE_FINETUNING = {  # the same within landmarks_finetuning: what may not be imported by the others
    "landmarks_finetuning.report": (),
    "landmarks_finetuning.pictures": ("evaluate", "predict", "suggest", "unscored", "cross_validation",
                                      "report"),
}
PACKAGES = ("core", *STAGES, "study", "benchmarks", "tests")
SOURCES = sorted(path for folder in PACKAGES for path in (PROJECT / folder).rglob("*.py"))
MODULES = {".".join(path.relative_to(PROJECT).with_suffix("").parts).removesuffix(".__init__"): path
           for path in SOURCES}


def room(module: str) -> str:
    """core.data.cache -> core.data, study.plan -> study."""
    parts = module.split(".")
    return ".".join(parts[: 2 if parts[0] == "core" else 1])


def imports(tree: ast.AST) -> set[str]:
    """Modules that a file imports, wherever in it, also by name through import_module or __import__."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name in MODULES else node.module for name in whole}
        elif isinstance(node, ast.Call) and called(node) in ("import_module", "__import__"):
            names |= {str(a.value) for a in node.args if isinstance(a, ast.Constant)}
    return names


def called(node):
    """The last name of what is called: torch.load -> load."""
    return getattr(node.func, "attr", getattr(node.func, "id", None))


def own_imports(module: str) -> set[str]:
    """The project's modules that `module` imports."""
    names = imports(ast.parse(MODULES[module].read_text(encoding="utf8")))
    return {name for name in names if name.split(".")[0] in PACKAGES}


def circles(graph: dict[str, set[str]]) -> list[str]:
    """The nodes that can reach themselves."""
    reach = {node: set(targets) for node, targets in graph.items()}
    for _ in graph:
        grown = {node: targets.union(*(reach.get(target, set()) for target in targets)) if targets else targets
                 for node, targets in reach.items()}
        if grown == reach:
            break
        reach = grown
    return sorted(node for node, targets in reach.items() if node in targets)


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


def test_every_room_is_on_the_plan():
    assert {room(module) for module in MODULES} - {"core", "tests"} == set(ARROWS)


@pytest.mark.parametrize("name", ARROWS)
def test_a_room_imports_only_what_lies_below_it(name):
    for module in MODULES:
        if room(module) == name:
            strange = {target for target in own_imports(module) if room(target) not in {*ARROWS[name], name}}
            assert not strange, (module, strange)


def test_data_never_imports_networks():
    """Not even through another module."""
    graph = {module: own_imports(module) for module in MODULES}
    for start in (module for module in MODULES if room(module) in ("core.data", "core.runs", "core.formats")):
        reached, ahead = set(), {start}
        while ahead:
            reached |= ahead
            ahead = set().union(*(graph.get(module, set()) for module in ahead)) - reached
        assert not [module for module in reached if room(module) in ("core.networks", "core.training")], start


@pytest.mark.parametrize("inner", INSIDE_FINETUNING)
def test_report_and_pictures_are_above_what_they_show(inner):
    allowed = {inner, *(f"landmarks_finetuning.{name}" for name in INSIDE_FINETUNING[inner])}
    for module in MODULES:
        if module.startswith("landmarks_finetuning") and ".".join(module.split(".")[:2]) not in allowed:
            assert not [name for name in own_imports(module) if name.startswith(inner)], module


def test_there_is_no_circle():
    graph = {module: own_imports(module) for module in MODULES if not module.startswith("tests")}
    assert circles(graph) == []


def test_no_module_beside_the_report_asks_for_a_start_by_name():
    """What differs between detectors is answered by `detectors.interface.Kind`; the report words what it compares."""
    for module, path in MODULES.items():
        if module.startswith("landmarks_finetuning.") and not module.startswith("landmarks_finetuning.report."):
            compared = {node.value for each in ast.walk(ast.parse(path.read_text(encoding="utf8")))
                        if isinstance(each, ast.Compare) for node in ast.walk(each) if isinstance(node, ast.Constant)}
            assert not compared & (set(BACKBONES) - {"random"}), module  # a selection is called "random", too


def test_datasets_is_no_package_and_no_file_is_named_utils():
    assert not (PROJECT / "datasets/__init__.py").exists()
    assert not [path for path in SOURCES if path.stem in ("utils", "util", "helpers", "common", "misc")]


def test_pickles_are_read_with_weights_only_and_nothing_is_swallowed():
    """Handlers may be broad where the launcher reports a run, or a check, that failed and goes on with the next.

    And in the drivers that look for what no handler catches, and where a process of a job ends in its own way.
    """
    broad = {"study/runner.py": 1, "core/training/distributed.py": 1, "study/check/launched.py": 1,
             "benchmarks/fuzz_readers.py": 1, "benchmarks/mistakes.py": 2, "benchmarks/killing.py": 1}
    for path in SOURCES:
        tree = ast.parse(path.read_text(encoding="utf8"))
        wanted = broad.get(path.relative_to(PROJECT).as_posix(), 0)
        assert not unsafe_loads(tree) and len(broad_handlers(tree)) == wanted, path


def obeys(tree: ast.Module) -> bool:
    """Whether `python -m` of a module does anything: its last statement runs the command where it is not imported."""
    last = tree.body[-1]
    return isinstance(last, ast.If) and ast.unparse(last.test) == "__name__ == '__main__'" and any(
        isinstance(node, ast.Call) for node in ast.walk(last))


def test_every_command_runs():
    """What has a main, and what a page, a config or a message tells to type, is not a module that only defines it."""
    with_main = {name for name, path in MODULES.items() if not name.startswith("tests")
                 and any(getattr(node, "name", "") == "main" for node in ast.parse(path.read_text("utf8")).body)}
    pages = [PROJECT / "README.md", *PROJECT.glob("docs/**/*.md"), *SOURCES]
    told = {name.rstrip(".") for page in pages if "tests" not in page.parts
            for name in re.findall(r"python -m ((?:[a-z_]+\.)*[a-z_0-9]+)", page.read_text("utf8"))}
    told = {f"{name}.__main__" if f"{name}.__main__" in MODULES else name for name in told}
    commands = with_main | {name for name in told if name.split(".")[0] in PACKAGES}
    assert commands <= MODULES.keys()
    assert [name for name in sorted(commands) if not obeys(ast.parse(MODULES[name].read_text("utf8")))] == []


def test_the_rules_can_fail():
    bad = ast.parse("def f():\n import ssl_baselines.views\n import_module('core.errors')\n from core import files\n"
                    " from core.data.cache import x\n"
                    " torch.load(p)\n torch.load(p, weights_only=False)\n torch.load(p, weights_only=True)\n"
                    " try: pass\n except (OSError, Exception): pass\n except ValueError: pass\n")
    assert imports(bad) == {"ssl_baselines.views", "core.errors", "core.files", "core.data.cache"}
    assert unsafe_loads(bad) == [6, 7] and broad_handlers(bad) == [10]
    assert not obeys(bad) and not obeys(ast.parse("def main(): pass\nmain()"))
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["b", "c"]

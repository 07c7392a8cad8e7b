"""The one-way rule: who may import whom, and that labels cannot reach what chooses a detector.

Rooms are the modules of `ssad_hpo`, or packages of the same name. The rule is read from the source with
`ast`, imports inside functions and under TYPE_CHECKING included, so it holds for code that no test runs.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Every edge that is allowed; adding a room or an edge is a decision, made visible here. `augment` is the
# ground: a task's space is of its kinds, and `data` makes the testbed's anomalies with a known f_gen.
ALLOWED = {
    "bounds": set(),
    "files": set(),
    "quiet": set(),
    "augment": {"bounds"},
    "task": {"augment", "bounds"},
    "address": set(),
    "storage": {"address", "files"},
    "trust": {"address", "files"},
    "calibration": {"bounds"},  # pure functions of scores
    "criteria": {"task", "calibration"},
    "consensus": {"task"},
    "encoder": {"task", "numerics"},
    "numerics": {"task", "bounds"},
    "data": {"task", "augment", "bounds", "files"},
    "evaluate": {"task"},
    "tracking": {"task", "address", "files", "trust"},
    "report": {"task", "augment"},
    "detector": {"task", "augment", "encoder", "numerics", "bounds", "files", "calibration"},
    "baselines": {"task", "augment", "encoder", "numerics"},
    "judgement": {"task", "criteria", "encoder", "detector", "calibration"},
    "combined": {"task", "criteria", "encoder", "detector", "bounds", "files", "calibration"},
    "search": {"task", "criteria", "consensus", "augment", "detector", "judgement", "bounds", "files"},
    "bilevel": {"task", "criteria", "augment", "encoder", "detector", "judgement", "numerics"},
    "raytune": {"task", "search", "address", "bounds", "files", "quiet"},
}
ALLOWED["serving"] = {"combined", "detector", "data", "bounds", "files"}
ALLOWED["export"] = {"combined", "detector", "encoder", "files", "quiet"}
ALLOWED["search"] |= {"calibration", "quiet"}
# The weights that trainings begin with, for all nodes; and what a trial does there.
ALLOWED["raytune"] |= {"detector", "encoder", "judgement"}
ALLOWED["bilevel"] |= {"bounds", "files"}
ALLOWED["experiment"] = set(ALLOWED)
ALLOWED["cli"] = set(ALLOWED)
ALLOWED["__main__"] = {"cli"}

ONLY_ROOM_OF = {"ray": "raytune", "mlflow": "tracking", "matplotlib": "report"}

# Where labels may be: read (data), judged (evaluate), shown (report, tracking), handed on (experiment, cli).
WITHOUT_LABELS = {
    "task", "criteria", "consensus", "augment", "encoder", "detector", "baselines", "judgement", "search",
    "bilevel", "raytune", "storage", "numerics", "combined", "calibration", "export",
    "quiet",
}  # fmt: skip
LABEL_WORDS = {"label", "labels", "truth"}


def room_of(path: Path) -> str:
    """`ssad_hpo/search.py` and `ssad_hpo/search/sampling.py` are both the room "search"."""
    return path.relative_to("ssad_hpo").parts[0].removesuffix(".py")


def imported_modules(tree: ast.AST, path: Path):
    """(line, absolute dotted name) of everything that a file imports; "?" for a computed name."""
    package = path.parent.parts
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else ()
            module = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                yield node.lineno, f"{module}.{alias.name}"
        elif isinstance(node, ast.Call):
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if called in ("import_module", "__import__"):
                name = node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else "?"
                relative = str(name).startswith(".")
                yield node.lineno, "?" if relative or len(node.args) > 1 else str(name)


def import_violations(source: str, path: Path) -> list[str]:
    """What a file of `ssad_hpo` or `studies` imports against the rule, one sentence each."""
    violations = []
    in_studies = path.parts[0] == "studies"
    room = "studies" if in_studies else room_of(path)
    if not in_studies and room not in ALLOWED:
        violations.append(f"{path}: {room} is not a room of the design")
    allowed = (set(ALLOWED) - {"cli", "__main__"}) if in_studies else ALLOWED.get(room, set())
    study = path.relative_to("studies").parts[0].removesuffix(".py") if in_studies else None

    for line, name in imported_modules(ast.parse(source), path):
        where, parts = f"{path}:{line}", name.split(".")
        if name == "?":
            violations.append(f"{where}: imports a computed name, which this test cannot follow")
        elif parts[0] == "ssad_hpo":
            target = parts[1] if len(parts) > 1 else None
            if target in ALLOWED:
                if target not in allowed | {room}:
                    violations.append(f"{where}: {room} may not import {target}")
            elif not in_studies and target != "__version__":
                violations.append(
                    f"{where}: {room} may not import the package's catalogue, which has all rooms"
                )
        elif in_studies and is_study(parts, study) and parts[:2] != ["studies", "lab"]:
            violations.append(f"{where}: a study may not import another study")
        elif parts[0] == "studies" and not in_studies:
            violations.append(f"{where}: {room} may not import a study")
        elif path.parts[:3] == ("studies", "lab", "figures") and parts[0] == "matplotlib":
            continue
        elif ONLY_ROOM_OF.get(parts[0], room) != room:
            violations.append(f"{where}: only {ONLY_ROOM_OF[parts[0]]} may import {parts[0]}")
    return violations


def is_study(parts: list[str], importer: str | None) -> bool:
    """Is the imported module another study: `studies.x`, or `x` as a script's neighbour."""
    name = parts[1] if parts[0] == "studies" and len(parts) > 1 else parts[0]
    studies = {path.stem for path in (ROOT / "studies").glob("*") if path.suffix in ("", ".py")}
    return name != importer and (parts[0] == "studies" or name in studies)


def catalogue_violations(source: str) -> list[str]:
    """Rooms that `ssad_hpo/__init__.py` imports as soon as it is imported, and not when first used."""
    violations = []
    pending = list(ast.parse(source).body)
    while pending:
        node = pending.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            pending += node.orelse
            continue
        for _, name in imported_modules(node, Path("ssad_hpo/__init__.py")) if is_import(node) else ():
            if name.split(".")[0] not in LIGHT_MODULES:
                violations.append(f"ssad_hpo/__init__.py:{node.lineno}: imports {name} eagerly")
        pending += ast.iter_child_nodes(node)
    return violations


LIGHT_MODULES = {"__future__", "importlib", "typing", "collections"}


def is_import(node: ast.AST) -> bool:
    return isinstance(node, (ast.Import, ast.ImportFrom))


def label_violations(source: str, path: Path) -> list[str]:
    """Identifiers, arguments and dictionary keys that speak of ground truth. Comments may."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names = [getattr(node, field, None) for field in ("id", "attr", "arg", "name", "asname")]
        names += [node.value] if isinstance(node, ast.Constant) else []
        for name in names:
            words = name.lower().split("_") if isinstance(name, str) and name.isidentifier() else []
            if LABEL_WORDS & set(words) or name == "y_true":
                found.append(f"{path}:{getattr(node, 'lineno', '?')}: {name}")
    return found


def sources(folder: str):
    paths = sorted((ROOT / folder).rglob("*.py")) if (ROOT / folder).is_dir() else []
    return [path.relative_to(ROOT) for path in paths]


ROOMS = [path for path in sources("ssad_hpo") if path != Path("ssad_hpo/__init__.py")]


@pytest.mark.parametrize("path", ROOMS + sources("studies"), ids=str)
def test_imports_run_one_way_only(path):
    assert import_violations((ROOT / path).read_text(encoding="utf-8"), path) == []


def test_the_catalogue_imports_its_rooms_when_they_are_used():
    catalogue = ROOT / "ssad_hpo" / "__init__.py"
    assert catalogue_violations(catalogue.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", [path for path in ROOMS if room_of(path) in WITHOUT_LABELS], ids=str)
def test_nothing_that_trains_or_chooses_speaks_of_labels(path):
    assert label_violations((ROOT / path).read_text(encoding="utf-8"), path) == []


@pytest.mark.parametrize("room", sorted(WITHOUT_LABELS))
def test_what_trains_or_chooses_cannot_reach_labels_through_any_chain_of_imports(room):
    reachable, pending = set(), [room]
    while pending:
        reachable |= ALLOWED[pending[-1]]
        pending += ALLOWED[pending.pop()]
    assert not reachable & {"data", "evaluate", "experiment", "cli", "tracking", "report"}


@pytest.mark.parametrize(
    ("path", "source", "complaint"),
    [
        ("ssad_hpo/search.py", "import ssad_hpo.data", "search may not import data"),
        ("ssad_hpo/search.py", "from ssad_hpo.evaluate import auc", "search may not import evaluate"),
        ("ssad_hpo/search.py", "from ssad_hpo import tracking", "search may not import tracking"),
        ("ssad_hpo/search.py", "from . import experiment", "search may not import experiment"),
        ("ssad_hpo/search.py", "from .raytune import tune", "search may not import raytune"),
        ("ssad_hpo/search/sampling.py", "from ..cli import main", "search may not import cli"),
        ("ssad_hpo/search/sampling.py", "from .. import data", "search may not import data"),
        ("ssad_hpo/bilevel.py", "def f():\n    from ssad_hpo import data", "bilevel may not import data"),
        ("ssad_hpo/bilevel.py", "from ssad_hpo import search", "bilevel may not import search"),
        ("ssad_hpo/raytune.py", "from ssad_hpo import report", "raytune may not import report"),
        ("ssad_hpo/criteria.py", "from .consensus import mc", "criteria may not import consensus"),
        ("ssad_hpo/augment.py", "from .task import Task", "augment may not import task"),
        ("ssad_hpo/augment.py", "from .data import load_folder", "augment may not import data"),
        ("ssad_hpo/data/testbed.py", "from ..encoder import SmallEncoder", "data may not import encoder"),
        ("ssad_hpo/task.py", "from ssad_hpo import criteria", "task may not import criteria"),
        ("ssad_hpo/experiment.py", "from ssad_hpo.cli import main", "experiment may not import cli"),
        ("ssad_hpo/search.py", "import ssad_hpo", "search may not import the package's catalogue"),
        ("ssad_hpo/search.py", "from ssad_hpo import auc", "search may not import the package's catalogue"),
        ("ssad_hpo/search.py", "from importlib import import_module\nimport_module('ssad_hpo.data')",
         "search may not import data"),
        ("ssad_hpo/search.py", "import importlib\nimportlib.import_module(name)", "a computed name"),
        ("ssad_hpo/search.py", "import importlib\nimportlib.import_module('.data', 'ssad_hpo')",
         "a computed name"),
        ("ssad_hpo/search.py", "import mlflow", "only tracking may import mlflow"),
        ("ssad_hpo/search.py", "from ray import tune", "only raytune may import ray"),
        ("ssad_hpo/experiment.py", "import matplotlib.pyplot as plt", "only report may import matplotlib"),
        ("ssad_hpo/experiment.py", "import studies.alignment", "experiment may not import a study"),
        ("ssad_hpo/utils.py", "", "utils is not a room of the design"),
        ("studies/alignment.py", "from studies import selection_table", "may not import another study"),
        ("studies/alignment.py", "from . import selection_table", "may not import another study"),
        ("studies/lab/cells.py", "from studies import alignment", "may not import another study"),
        ("studies/alignment.py", "import matplotlib", "only report may import matplotlib"),
        ("studies/lab/cells.py", "import matplotlib", "only report may import matplotlib"),
        ("studies/alignment.py", "from ssad_hpo.cli import main", "studies may not import cli"),
        ("studies/alignment.py", "import mlflow", "only tracking may import mlflow"),
    ],
)  # fmt: skip
def test_a_forbidden_import_is_reported(path, source, complaint):
    violations = import_violations(source, Path(path))
    assert len(violations) == 1 and complaint in violations[0]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("ssad_hpo/search.py", "from ssad_hpo.task import Task\nfrom .detector import train\nimport optuna"),
        ("ssad_hpo/search/sampling.py", "from .objective import Objective\nfrom ..task import Task"),
        ("ssad_hpo/search/sampling.py", "from ssad_hpo.search import select\nfrom . import objective"),
        ("ssad_hpo/data/testbed.py", "from ssad_hpo.augment import apply"),
        ("ssad_hpo/tracking.py", "def f():\n    import mlflow"),
        ("ssad_hpo/experiment.py", "from ssad_hpo import evaluate, raytune, __version__"),
        ("studies/alignment.py", "import ssad_hpo\nfrom ssad_hpo import experiment, load_folder"),
    ],
)
def test_an_allowed_import_is_not_reported(path, source):
    assert import_violations(source, Path(path)) == []


@pytest.mark.parametrize(
    "source",
    ["from ssad_hpo.search import select", "from . import task", "import torch",
     "try:\n    from .task import Task\nexcept ImportError:\n    pass"],
)  # fmt: skip
def test_an_eager_import_in_the_catalogue_is_reported(source):
    assert len(catalogue_violations(source)) == 1


def test_a_lazy_import_in_the_catalogue_is_not_reported():
    source = """
from typing import TYPE_CHECKING
import importlib
if TYPE_CHECKING:
    from ssad_hpo.task import Task
def __getattr__(name):
    return getattr(importlib.import_module(f"ssad_hpo.{ROOM_OF[name]}"), name)
"""
    assert catalogue_violations(source) == []


@pytest.mark.parametrize(
    "source",
    ["labels = 1", "def f(test_labels): pass", "x.label", "f(labels=x)", "row['label']", "y_true = 0",
     "def read_labels(): pass", "from x import y as label", "GROUND_TRUTH = 1"],
)  # fmt: skip
def test_a_word_for_ground_truth_is_reported(source):
    assert label_violations(source, Path("ssad_hpo/search.py"))


@pytest.mark.parametrize("source", ["unlabeled = 1", "targets = 1  # no labels", '"""Needs no labels."""'])
def test_a_word_that_only_sounds_like_ground_truth_is_not_reported(source):
    assert label_violations(source, Path("ssad_hpo/search.py")) == []

"""Packages import only from packages above them, and heavy libraries only where used.

Beside it what the code keeps to: short files and functions, and names of their own.
"""

import ast
import builtins
import graphlib
import importlib
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

import hsee_jax

ROOT = Path(hsee_jax.__file__).parent
ORDER = (
    "core parallel nn link optim data federation algorithms engine systems config runs "
    "tracking inference report deployment studies cli"
).split()
FILES = {
    ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(
        ".__init__"
    ): path
    for path in ROOT.rglob("*.py")
}
TREES = {name: ast.parse(path.read_text()) for name, path in FILES.items()}
MODULES = {
    name: tree
    for name, tree in TREES.items()
    if name not in ("hsee_jax", "hsee_jax.__main__")
}


def package(module):
    return module.split(".")[1]


def imports(name):
    """Yield the modules of the house that a module imports, anywhere in it."""
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relative to itself"
            found = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for other in found:
            while other not in TREES and "." in other:
                other = other.rpartition(".")[0]
            if other in TREES:
                yield other


def test_every_package_imports_only_from_above():
    """All of the house is in the order; only the version is taken from its top."""
    assert {package(name) for name in MODULES} == set(ORDER)
    place = {name: number for number, name in enumerate(ORDER)}
    for name in MODULES:
        for other in imports(name):
            if other == "hsee_jax":
                assert name == "hsee_jax.cli.main"
            else:
                assert place[package(other)] <= place[package(name)], (name, other)


def test_the_library_knows_no_configuration():
    readers = {package(n) for n in MODULES if "hsee_jax.config" in FILES[n].read_text()}
    assert readers == {"config", "runs", "studies", "cli"}


def test_no_file_imports_itself_over_others():
    """Within a package, whose files do not import from its own front."""
    for folder in ORDER:
        names = [name for name in MODULES if package(name) == folder]
        front = f"hsee_jax.{folder}"
        graph = {n: {o for o in imports(n) if o in names} - {n} for n in names}
        inner = {n: others - {front} for n, others in graph.items() if n != front}
        graphlib.TopologicalSorter(inner).prepare()
        assert all(front not in graph[n] for n in inner), folder


@pytest.mark.parametrize("folder", ORDER)
def test_a_package_lists_its_names(folder):
    module = importlib.import_module(f"hsee_jax.{folder}")
    assert len(module.__all__) == len(set(module.__all__)) > 0
    for name in module.__all__:
        assert hasattr(module, name), name


def test_files_are_short():
    lengths = {name: FILES[name].read_text().count("\n") for name in FILES}
    assert statistics.median(lengths.values()) <= 120
    assert {name: length for name, length in lengths.items() if length > 300} == {}


def functions(tree):
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [node for node in ast.walk(tree) if isinstance(node, kinds)]


def test_functions_are_short():
    lengths = {
        f"{name}.{function.name}": function.end_lineno - function.lineno + 1
        for name, tree in TREES.items()
        for function in functions(tree)
    }
    assert {name: length for name, length in lengths.items() if length > 60} == {}


def own_names(tree):
    """Yield the names that a module gives, but those in the body of a class."""
    members = {
        id(member)
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        for statement in node.body
        for member in (statement, *getattr(statement, "targets", ()))
    }
    members |= {
        id(node.target)
        for node in ast.walk(tree)
        if isinstance(node, ast.AnnAssign) and id(node) in members
    }
    for node in ast.walk(tree):
        if id(node) in members:
            continue
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.alias):
            yield node.asname or node.name.partition(".")[0]


def test_no_builtin_is_shadowed():
    known = {name for name in dir(builtins) if not name.startswith("_")}
    found = {n: known & set(own_names(tree)) for n, tree in TREES.items()}
    assert {name: names for name, names in found.items() if names} == {}


def imported(tree):
    """Yield the modules that a module imports, or imports from."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def test_each_library_has_one_home():
    homes = {
        "flax.linen": {
            "nn.gated_layer",
            "nn.layers",
            "nn.mixer",
            "nn.mlp",
            "nn.mobilenet",
            "nn.mobilenet_v3",
            "nn.normalization",
            "nn.resnet",
            "nn.sian",
            "nn.vit",
        },
        "orbax": {"runs.checkpoint", "runs.checkpoint_writer"},
        "safetensors": {"deployment.export", "deployment.protocol", "nn.pretrained"},
        "matplotlib": {
            "report.agreement",
            "report.figures",
            "report.final",
            "report.gantt",
            "report.gate",
            "report.heat_maps",
            "report.interactions",
            "report.progress",
            "report.style",
            "studies.picture",
        },
        "tensorboardX": {"tracking.event_files"},
        "wandb": {"tracking.wandb_run"},
        "mlflow": {"tracking.mlflow_run"},
        "pooch": {"data.download"},
        "scipy": {"systems.accuracy", "systems.bandwidth", "systems.milp"},
        "tensorflow_datasets": {"data.prepared"},
        "pyarrow": {"data.parquet"},
        "PIL": {"data.pictures"},
        "grpc": {
            "cli.serve",
            "deployment.credentials",
            "deployment.frozen",
            "deployment.rpc",
        },
        "jax2onnx": {"deployment.onnx_program"},
        "onnxruntime": {"deployment.frozen"},
        "cryptography": {"deployment.certificates", "deployment.enroll"},
    }
    for library, allowed in homes.items():
        users = {
            name.removeprefix("hsee_jax.")
            for name, tree in TREES.items()
            if any(f"{found}.".startswith(f"{library}.") for found in imported(tree))
        }
        assert users == allowed


def test_import_is_light_and_fast():
    """Under two seconds of processor time, which other tests do not stretch."""
    code = (
        "import sys, time; start = time.process_time(); import hsee_jax;"
        "assert 'jax' not in sys.modules; hsee_jax.train;"
        "print(time.process_time() - start);"
        "import hsee_jax.cli.train, hsee_jax.cli.gate, hsee_jax.cli.export;"
        "import hsee_jax.cli.plan, hsee_jax.cli.join, hsee_jax.deployment.take_part;"
        "heavy = {'tensorflow', 'tensorflow_datasets', 'pooch', 'matplotlib', "
        "'tensorboardX', 'wandb', 'mlflow', 'safetensors', 'scipy.optimize', "
        "'grpc', 'cryptography', 'orbax'};"
        "print(heavy & set(sys.modules))"
    )
    times = []
    for _ in range(3):
        result = subprocess.run(
            [sys.executable, "-c", code], check=True, capture_output=True, text=True
        )
        seconds, heavy = result.stdout.splitlines()
        assert heavy == "set()"
        times.append(float(seconds))
        if times[-1] < 2.0:
            return
    raise AssertionError(times)


def test_the_front_shows_few_names():
    """Those that most programs need; the rest stands in the packages."""
    names = set(hsee_jax.__all__) - set(ORDER)
    assert names == {
        "train",
        "build",
        "restore",
        "preset",
        "override",
        "Config",
        "Experiment",
        "Federation",
        "Client",
        "Strategy",
        "Model",
        "Stage",
        "Batch",
        "UserError",
        "DivergenceError",
        "Stopped",
    }
    assert set(hsee_jax.__all__) >= set(ORDER) - {"cli"}
    assert all(hasattr(hsee_jax, name) for name in hsee_jax.__all__)

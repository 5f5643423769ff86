"""Files import only from files above them, and heavy packages only where used."""

import ast
import subprocess
import sys
from pathlib import Path

import hsee_jax

PACKAGE = Path(hsee_jax.__file__).parent
ORDER = (
    "base fields config data.info data.arrays data.archives data.prepared "
    "data.download data partition augment losses conv resnet model optim mesh link "
    "split aggregate federation compose strategies plan engine.common engine.loop "
    "engine.scan engine traffic evaluate inference calibration store experiment "
    "processes folder checkpoint restored runs tables gating gate_report export "
    "flags curves figures report api cli.commands cli.signals cli.streams cli.main "
    "cli cli.terminal cli.arguments cli.train cli.inspect cli.gate cli.export "
    "cli.report cli.data __main__"
).split()


def imported(path):
    """Modules of the package that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
            "hsee_jax"
        ):
            parts = node.module.split(".")[1:]
            for alias in node.names:
                module = ".".join([*parts, alias.name])
                yield module if module in ORDER else ".".join(parts)


def test_every_file_imports_only_from_above():
    names = {
        path: ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        for path in PACKAGE.rglob("*.py")
    }
    files = {name.removesuffix(".__init__"): path for path, name in names.items()}
    del files["__init__"]
    assert set(files) == set(ORDER)
    for name, path in files.items():
        for other in imported(path):
            assert ORDER.index(other) < ORDER.index(name), f"{name} imports {other}"


def test_each_library_has_one_home():
    homes = {
        "flax.linen": {"resnet.py"},
        "orbax": {"checkpoint.py"},
        "safetensors": {"export.py"},
        "matplotlib": {"figures.py", "gate_report.py"},
        "tensorboardX": {"report.py"},
    }
    for library, allowed in homes.items():
        statements = (f"import {library}", f"from {library}")
        users = {
            path.name
            for path in PACKAGE.rglob("*.py")
            if any(statement in path.read_text() for statement in statements)
        }
        assert users == allowed


def test_import_is_light_and_fast():
    """Under two seconds of processor time, which other tests do not stretch."""
    code = (
        "import sys, time; import hsee_jax.cli; assert 'jax' not in sys.modules;"
        "start = time.process_time(); hsee_jax.train;"
        "print(time.process_time() - start);"
        "from hsee_jax.cli import train, inspect, export;"
        "heavy = {'tensorflow', 'tensorflow_datasets', 'pooch', 'matplotlib', "
        "'tensorboardX', 'safetensors'};"
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
    assert min(times) < 2.0, times

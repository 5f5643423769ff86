"""A strict session: no silent promotion of dtype or rank, and eight devices.

Tests compile more than they compute, so XLA does without its costly optimizations, and
where jaxlib still has them, with its older emitters, which compile in a third of the
time; set JAX_DISABLE_MOST_OPTIMIZATIONS=0 for programs as users get them. The emitters
join products and sums of different operations in one instruction; AVX has none for
that, so that a value does not depend on what else its program computes. Programs that
several tests compile alike are compiled once, through JAX's own cache.
"""

import atexit
import gc
import logging
import os
import shutil
import tempfile
from importlib.metadata import version

_cache = tempfile.mkdtemp(prefix="hsee-jax-tests-")
atexit.register(shutil.rmtree, _cache, ignore_errors=True)
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", _cache)
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.03")
quick = os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] != "0"
if quick and version("jaxlib").startswith("0.10."):
    older = "--xla_cpu_use_fusion_emitters=false --xla_cpu_max_isa=AVX"
    # Programs this small take longer to split for several threads than to compile.
    older += " --xla_cpu_parallel_codegen_split_count=1"
    os.environ.setdefault("XLA_FLAGS", older)

import jax  # noqa: E402
import pytest  # noqa: E402

gc.set_threshold(50_000)  # tracing makes many objects, and few of them are garbage

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

# Files that take longest begin first, so that no worker ends long after the others.
LONG = (
    "test_reuse",
    "test_strategies",
    "test_survival",
    "test_cli",
    "test_contracts",
    "test_mesh",
    "test_processes",
    "test_runs",
    "test_engine",
    "test_docs",
)


def pytest_collection_modifyitems(items):
    """Put the long files first, in this order; the order within a file stays."""
    places = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONG)))


@pytest.fixture
def said(caplog, monkeypatch):
    """What the package logs, also after a command line in the same process."""
    log = logging.getLogger("hsee_jax")
    monkeypatch.setattr(log, "propagate", True)
    monkeypatch.setattr(log, "handlers", [])
    caplog.set_level(logging.INFO, "hsee_jax")
    return lambda: [r.message for r in caplog.records if "datasets" in r.name]


@pytest.fixture
def monkeypatch(monkeypatch):
    """pytest's; what was made before a `setattr` is made anew after it."""
    from hsee_jax.core.reuse import forget

    change = monkeypatch.setattr

    def setattr(*args, **named):
        change(*args, **named)
        forget()

    monkeypatch.setattr = setattr
    yield monkeypatch
    monkeypatch.undo()
    forget()


@pytest.fixture
def lenient():
    """No strict dtypes: a step of optax's Adam multiplies numbers of two types."""
    jax.config.update("jax_numpy_dtype_promotion", "standard")
    yield
    jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture
def uncounted():
    """Forget the costs of layers that earlier tests had counted."""
    from hsee_jax.systems.costs import part_cost

    part_cost.cache_clear()

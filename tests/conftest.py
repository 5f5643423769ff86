"""A strict session: no silent promotion of dtype or rank, and eight devices.

Tests compile more than they compute: XLA does without its costly optimizations, unless
JAX_DISABLE_MOST_OPTIMIZATIONS=0 is set, and programs that several tests compile alike
are compiled once, through JAX's own cache.
"""

import atexit
import os
import shutil
import tempfile

_cache = tempfile.mkdtemp(prefix="hsee-jax-tests-")
atexit.register(shutil.rmtree, _cache, ignore_errors=True)
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", _cache)
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

import jax  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

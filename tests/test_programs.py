"""The number of programs that are compiled, which costs most of a short run's time."""

import jax
import jax.numpy as jnp
import pytest
from programs import compiled_programs
from tiny import TINY

from hsee_jax import runs
from hsee_jax.cli import main
from hsee_jax.config import override, preset
from hsee_jax.core.reuse import forget
from hsee_jax.engine.programs import compile_together

SHORT = {
    "rounds": 2,
    "eval_every": 1,
    "checkpoint_every": 1,
    "max_train_samples": 120,
    "max_test_samples": 20,
}


def programs_of(folder, **options):
    """The number of programs of a short run of the demo, when nothing is compiled."""
    jax.clear_caches()
    forget()
    with compiled_programs() as programs:
        runs.train(override(preset("demo"), **SHORT | options), folder)
    return len(programs)


def test_a_run_compiles_few_programs_however_many_clients_it_has(tmp_path):
    """Of three cuts, as in the demo: training, evaluation and checkpoints together."""
    cuts = {**TINY, "cuts": ("1", "2", "3")}
    few = programs_of(tmp_path / "few", **cuts)
    assert few <= 30
    assert programs_of(tmp_path / "more", **cuts, num_clients=12) == few


@pytest.mark.slow
def test_the_demo_compiles_few_programs(tmp_path):
    jax.clear_caches()
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in SHORT.items()]
    with compiled_programs() as programs:
        main(["train", "demo", *flags, "--out", str(tmp_path / "run")])
    assert len(programs) <= 30


def test_what_is_compiled_together_is_not_compiled_again():
    functions = [jax.jit(lambda x, n=n: jnp.sin(x) * n) for n in range(3)]
    x = jnp.ones(3)
    with compiled_programs() as programs:
        compile_together(function.lower(x) for function in functions)
        assert len(programs) == 3
        for function in functions:
            function(x)
    assert len(programs) == 3


def test_an_error_of_a_compilation_is_raised():
    class Broken:
        def compile(self):
            raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        compile_together([Broken()])

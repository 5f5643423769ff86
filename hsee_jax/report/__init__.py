"""Reports of runs: curves, figures and tables on one page, and the results of a gate.

Figures need matplotlib; only the modules and functions that draw import it.
"""

from hsee_jax.report.curves import Curve, Run, read_curves

__all__ = ["Curve", "Run", "read_curves"]

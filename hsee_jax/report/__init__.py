"""Runs on one page: curves, figures, tables; and what a gate gives.

Figures need matplotlib, which is imported where they are drawn.
"""

from hsee_jax.report.curves import Curve, Run, read_curves

__all__ = ["Curve", "Run", "read_curves"]

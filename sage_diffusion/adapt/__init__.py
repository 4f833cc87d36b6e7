"""Precision that adapts: measure what each layer and step can bear, plan, guard, prove.

``calibrate`` -> :class:`~sage_diffusion.adapt.table.ScoreTable` -> ``make_plan`` ->
:class:`~sage_diffusion.plan.PrecisionPlan`.
"""

#: Part of the cells that calibration measures unless the caller says otherwise.
DEFAULT_SHARE = 0.15

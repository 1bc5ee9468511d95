"""The objectives that a configuration can name: one file each, and one line here."""

from fast_attention.protein_lm.modeling.objectives.base import Objective
from fast_attention.protein_lm.modeling.objectives.causal import Causal
from fast_attention.protein_lm.modeling.objectives.masked import Masked
from fast_attention.protein_lm.modeling.objectives.span_corruption import SpanCorruption
from fast_attention.protein_lm.ranges import check_choice

OBJECTIVES: dict[str, type[Objective]] = {
    cls.name: cls
    for cls in (
        Causal,
        Masked,
        SpanCorruption,
    )
}


def get_objective(objective: Objective | str) -> Objective:
    """Returns the objective that is meant: itself, or that of a name with its defaults.

    Raises:
      ValueError: If there is none of that name.
    """
    if isinstance(objective, Objective):
        return objective
    check_choice("objective", objective, OBJECTIVES)
    return OBJECTIVES[objective]()

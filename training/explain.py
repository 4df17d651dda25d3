"""``bitring.explain``: what was chosen, and why."""

from __future__ import annotations

from bitring.collectives.base_plan import Plan
from bitring.collectives.plan import explain as explain_plan
from bitring.training.model_parallel import ModelParallel


def explain(what: Plan | ModelParallel) -> str:
    """Explain a plan in one line: which algorithm was chosen, and why; or a ModelParallel in several.

    Of that: which rank has what of each layer, and the bytes and waits of each conversion. Raises TypeError for
    anything else.
    """
    return what.explain() if isinstance(what, ModelParallel) else explain_plan(what)

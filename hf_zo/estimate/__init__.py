"""Estimates memory and the time of a step from a model's shapes, without its weights.

    python -m hf_zo.estimate meta-llama/Llama-3.2-1B

Estimates come from the implementation where possible: the blocks are those that streaming would
choose, and the memory of a probe is counted while one runs on the meta device, where tensors have
shapes but no bytes.
"""

from .picture import as_bars, save_plot
from .plan import Row, Workload, estimate
from .rates import Rates, measure_rates
from .skeleton import skeleton
from .table import as_json, as_table

__all__ = [
    "Rates",
    "Row",
    "Workload",
    "as_bars",
    "as_json",
    "as_table",
    "estimate",
    "measure_rates",
    "save_plot",
    "skeleton",
]

"""One forward pass with fewer tokens: what runs while a patched model runs.

What is imported here is what a patch may use.
"""

from tokred.engine.layout import Layout
from tokred.engine.leaving import outside_of_the_graph
from tokred.engine.pooling import poolable, pooled, pooled_with_mask, tokens_there
from tokred.engine.reduction import Reduction
from tokred.engine.sampling import tensors_in
from tokred.engine.step import Step
from tokred.engine.windows import Seen, biased, shifts
from tokred.engine.without_mask import attention_without_mask
from tokred.graphs import in_a_graph

__all__ = [
    "Layout",
    "Reduction",
    "Seen",
    "Step",
    "attention_without_mask",
    "biased",
    "in_a_graph",
    "outside_of_the_graph",
    "poolable",
    "pooled",
    "pooled_with_mask",
    "shifts",
    "tensors_in",
    "tokens_there",
]

"""How results are drawn: pictures of tokens, charts, tables and pages.

Importing this folder registers the drawings of all results, see `tokred.measure.results`.
"""

from tokred.show import evaluations, profiles  # noqa: F401 - which register what they draw

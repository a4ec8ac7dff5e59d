"""The documentation as a site: `sphinx-build -W --keep-going -b html docs build/site`.

The pages are the Markdown files of this folder, which are read in the repository, too. What only
the site has is in `extensions`: links that leave the folder, tables and plots of the benchmarks,
and the notebooks of `examples`, which are shown with the outputs they are stored with.
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "extensions"))

import tokred  # noqa: E402

project = "tokred"
author = "the authors of tokred"
project_copyright = "Apache-2.0"
version = release = tokred.__version__

extensions = [
    "myst_nb",  # brings myst_parser
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "benchmarks",
    "docstrings",
    "links",
    "notebooks",
]
exclude_patterns = ["benchmarks/**", "extensions/**", "static/**"]

# Markdown
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 4
nb_execution_mode = "off"
nb_ipywidgets_js: dict[str, str] = {}  # no notebook has any, and the site fetches nothing
copybutton_exclude = ".linenos, .gp, .go"

# Docstrings. In these, `single` backticks are code, and names are linked where they can be.
default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_use_ivar = True
napoleon_numpy_docstring = False
python_use_unqualified_type_names = True
maximum_signature_line_length = 78
toc_object_entries_show_parents = "hide"

# The page
html_theme = "furo"
html_title = f"tokred {version}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_show_sphinx = False
html_show_copyright = False
pygments_style = "friendly"
pygments_dark_style = "github-dark"
html_theme_options = {"navigation_with_keys": True, "top_of_page_buttons": []}

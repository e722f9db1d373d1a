"""Sphinx: `sphinx-build -W docs docs/_build`."""

import orthojax

project = "orthojax"
author = "the orthojax authors"
release = orthojax.__version__
html_title = f"orthojax {release}"

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax", "myst_nb"]
html_theme = "furo"
exclude_patterns = ["_build", "runs"]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
default_role = "code"  # single backquotes

nb_execution_mode = "off"  # the notebook is stored with its output
myst_heading_anchors = 3
suppress_warnings = ["myst.xref_missing"]  # links to files outside docs/

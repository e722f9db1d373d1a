"""Sphinx: `sphinx-build -W docs docs/_build`."""

import orthojax

project = "orthojax"
author = "the orthojax authors"
release = orthojax.__version__
html_title = f"orthojax {release}"

if tags.has("online"):  # noqa: F821  (defined by Sphinx); else a build needs no network
    intersphinx_mapping = {
        "jax": ("https://docs.jax.dev/en/latest", None),
        "flax": ("https://flax-linen.readthedocs.io/en/latest", None),
        "optax": ("https://optax.readthedocs.io/en/latest", None),
    }

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx.ext.intersphinx",
    "myst_nb",
]
html_theme = "furo"
exclude_patterns = ["_build", "runs"]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
default_role = "py:obj"  # single backquotes: a link where the name is known, else code

nb_execution_mode = "off"  # the notebook is stored with its output
myst_heading_anchors = 3
suppress_warnings = ["myst.xref_missing"]  # links to files outside docs/

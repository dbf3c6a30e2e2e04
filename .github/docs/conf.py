"""Builds the site from the guide and the docstrings: `python -m sphinx -W .github/docs site`."""

from __future__ import annotations

import dloop

project = "dloop"
author = "the authors of dloop"
version = release = dloop.__version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
html_theme = "furo"
html_title = "dloop"
html_show_copyright = False
exclude_patterns = ["site"]
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
napoleon_google_docstring = True
nitpicky = False
myst_heading_anchors = 2

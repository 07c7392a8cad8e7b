"""How the documentation is built: `make docs`; nothing is fetched."""

from importlib.metadata import version as version_of

project = "ssad_hpo"
author = copyright = "the ssad_hpo developers"
release = version = version_of("ssad-hpo")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build", "examples"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

default_role = "code"  # single backticks in docstrings

html_theme = "furo"
html_title = "ssad_hpo"
html_theme_options = {"sidebar_hide_name": False}

autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints = "none"  # the docstrings say what arguments are, with shapes and units
napoleon_google_docstring, napoleon_numpy_docstring = True, False
napoleon_use_ivar = True
# Several classes have an attribute of one name; none is meant to be linked to.
suppress_warnings = ["ref.python"]

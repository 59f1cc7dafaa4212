"""Sphinx: Markdown through MyST, the Python API from its docstrings, the headers as they are."""

from importlib.metadata import version as installed_version

project = "flexprefill"
author = "The flexprefill developers"
copyright = "The flexprefill developers"
release = version = installed_version("flex_prefill")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
# Docstrings of the torch side are read without importing torch's own documentation.
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
# Links into the source tree, which the pages are also read in.
suppress_warnings = ["myst.xref_missing"]

html_theme = "furo"
html_title = f"flexprefill {release}"
html_static_path = []

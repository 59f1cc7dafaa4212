"""Sphinx: Markdown through MyST, the Python API from its docstrings, the headers as they are."""

import re

import flex_prefill

project = "flexprefill"
author = "The flexprefill developers"
copyright = "The flexprefill developers"
release = version = flex_prefill.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
# Links into the source tree, which the pages are also read in.
suppress_warnings = ["myst.xref_missing"]

html_theme = "furo"
html_title = f"flexprefill {release}"
html_static_path = []


def _list_options(app, what, name, obj, options, lines):
    """Docstrings say ``name: meaning``, one a line; a list shows them so."""
    listed, inside = [], False
    for line in lines:
        option = re.match(r"([a-z_]+(?:, [a-z_]+)*): (.*)", line)
        if option:
            if not inside:
                listed.append("")
            listed.append(f"* ``{option[1]}``: {option[2]}")
        elif inside and line.strip():
            listed.append(f"  {line.strip()}")
        else:
            listed.append(line)
        inside = bool(option) or (inside and bool(line.strip()))
    lines[:] = listed


def setup(app):
    app.connect("autodoc-process-docstring", _list_options)

"""Sphinx's settings; the package documented is the installed one."""

from importlib.metadata import version as installed_version

project = "pagealloc"
author = "The pagealloc authors"
copyright = "2026, The pagealloc authors"
release = version = installed_version("pagealloc")

extensions = [
    "myst_parser",
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"pagealloc {release}"

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_mock_imports = ["llama_cpp", "opentelemetry", "prometheus_client"]  # extras
autodoc_typehints = "none"  # numpydoc's Parameters tell them
numpydoc_show_class_members = False

"""Sphinx: furo, MyST, and an API reference from docstrings."""

import sys
from importlib.metadata import version as installed_version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # native_stub

project = "pyublk"
author = "The pyublk authors"
project_copyright = "2026, The pyublk authors"
version = release = installed_version("pyublk")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "native_stub"]
html_theme = "furo"
html_title = "pyublk"
html_static_path = ["_static"]
html_css_files = ["narrow.css"]
exclude_patterns = ["_build", "__pycache__"]
myst_heading_anchors = 3
myst_enable_extensions = ["deflist"]
autodoc_member_order = "bysource"
autodoc_typehints = "description"
default_role = "code"

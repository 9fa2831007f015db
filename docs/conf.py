"""Settings of the documentation's site: `make docs`."""

import re
from typing import Any

from nvembed_deploy.version import __version__

project = "nvembed-deploy"
author = "the developers of nvembed-deploy"
copyright = author
release = version = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
source_suffix = {".md": "markdown"}
myst_heading_anchors = 3
default_role = "code"  # docstrings mark code with single backticks
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
html_theme = "furo"
html_title = f"nvembed-deploy {release}"
html_copy_source = False
copybutton_exclude = ".linenos, .gp"
autodoc_mock_imports = ["langchain_core", "mteb", "sentence_transformers", "torch"]
suppress_warnings = ["myst.header"]  # the generated command reference goes from a group to a command

PAGES = {
    "../README.md": "site/what-was-run.md",
    "../SECURITY.md": "site/security.md",
    "../CHANGELOG.md": "site/changelog.md",
    "../CONTRIBUTING.md": "site/contributing.md",
    "../models/nv-embed-mini/README.md": "site/model-card.md",
}
"""Files outside of docs/, and the pages that include them: pages link to the files, as readers of the sources do."""


def _link_to_pages(app: Any, name: str, content: list[str]) -> None:
    for file, page in PAGES.items():
        content[0] = re.sub(rf"\]\({re.escape(file)}(#[\w-]+)?\)", f"]({page})", content[0])


def setup(app: Any) -> None:
    """Registers the hook, as Sphinx expects."""
    app.connect("source-read", _link_to_pages)

# SPDX-License-Identifier: Apache-2.0
"""How Sphinx builds the site: `make docs`.

The repository is the source folder, so that links between pages are the same
on the site and in the repository.
"""

import pathlib
import sys

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE))

import reference_pages  # noqa: E402

reference_pages.write(HERE / "reference")

project = "jlora"
author = "the authors of jlora"
extensions = ["myst_nb"]
root_doc = "docs/index"
include_patterns = [
  "*.md",
  "docs/**",
  "experiments/README.md",
  "pallas_kernels/README.md",
]
exclude_patterns = ["docs/*.py", "docs/first_page", ".venv", "build"]
highlight_language = "text"

myst_heading_anchors = 3
nb_execution_mode = "off"  # committed with outputs; tests run them

html_theme = "furo"
html_title = "jlora"
html_extra_path = ["first_page"]
# No fonts, scripts or pictures of other hosts.
html_theme_options = {"sidebar_hide_name": False}

"""Settings of the documentation's site, which `make docs` builds into build/docs.

Pages are Markdown (MyST). Those with a notebook's header are executed, and an error in one of their
cells fails the build, as any warning does. Formulas become MathML while building, so that a reader
needs no network. Links to JAX, optax and flax need their inventories: with the network, set
INTERSPHINX=1; without, the names stand there as plain code.
"""

import os
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs"))
NOTEBOOKS_SEE = {
    "JUPYTER_PATH": str(ROOT / "docs" / "jupyter"),
    "JAX_PLATFORMS": "cpu",
    "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
}
"""A kernel that logs errors only; compilation that is quick and remembered, as in the tests."""
for name, value in NOTEBOOKS_SEE.items():
    os.environ.setdefault(name, value)
ROOT_PAGES = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
}
"""Files that stand at the root of the repository, and the pages that show them."""

project = "proma_jax"
html_title = "proma_jax"
author = copyright = "the authors of proma_jax"

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "mathml",
]
html_theme = "sphinx_book_theme"
html_theme_options = {
    "show_navbar_depth": 1,
    "show_toc_level": 2,
    "use_download_button": False,
    "use_fullscreen_button": False,
    "navbar_persistent": [],
}
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
smartquotes = False
html_math_renderer = "mathml"

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "auto"
nb_execution_raise_on_error = True
nb_execution_timeout = 600
nb_merge_streams = True

autodoc_typehints = "none"
autodoc_member_order = "bysource"
default_role = "py:obj"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
python_maximum_signature_line_length = 80

if os.environ.get("INTERSPHINX"):
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "jax": ("https://docs.jax.dev/en/latest", None),
        "optax": ("https://optax.readthedocs.io/en/latest", None),
        "flax": ("https://flax.readthedocs.io/en/stable", None),
    }


def show_root_page(app, docname, source):
    """Puts a file of the root in the place of its page, with links as they are from docs/."""
    names = {page.removesuffix(".md"): name for name, page in ROOT_PAGES.items()}
    if docname in names:
        text = (ROOT / names[docname]).read_text()
        source[0] = re.sub(r"(!?)\[([^]]*)\]\(((?!https?:|#)[^)]+)\)", _link_from_docs, text)


def _link_from_docs(link):
    """The link if it leads to a page or picture of the site, else its text."""
    mark, text, target = link.groups()
    page = ROOT_PAGES.get(target, target.removeprefix("docs/"))
    is_here = (ROOT / "docs" / page.split("#")[0]).is_file()
    return f"{mark}[{text}]({page})" if is_here else text


def escape_markup(app, what, name, obj, options, lines):
    """Keeps shapes, as (b, *layers, d), and plurals, as `name`s, from being taken for markup."""
    lines[:] = [re.sub(r"\*(?=[a-z])", r"\\*", re.sub(r"`s\b", r"`\\ s", line)) for line in lines]


def setup(app):
    """What Sphinx calls to connect the functions above."""
    app.connect("source-read", show_root_page)
    app.connect("autodoc-process-docstring", escape_markup)

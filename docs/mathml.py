"""A Sphinx extension that writes formulas as MathML, which browsers draw without a script.

`html_math_renderer = "mathml"` chooses it. docutils translates the formulas; what it does not know
is an error that names the formula.
"""

from docutils import nodes
from docutils.utils.math import latex2mathml
from sphinx.errors import SphinxError


def _mathml(tex, display):
    try:
        return latex2mathml.tex2mathml(tex, as_block=display)
    except Exception as error:
        raise SphinxError(f"The formula {tex!r} cannot be written as MathML: {error}") from error


def _inline(self, node):
    self.body.append(_mathml(node.astext(), display=False))
    raise nodes.SkipNode


def _display(self, node):
    self.body.append(f'<div class="math">{_mathml(node.astext(), display=True)}</div>')
    raise nodes.SkipNode


def setup(app):
    """What Sphinx calls to connect the functions above."""
    app.add_html_math_renderer("mathml", (_inline, None), (_display, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}

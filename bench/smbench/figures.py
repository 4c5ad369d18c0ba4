"""What all figures share: size, style, and the way to a PNG. Owns looks; computes nothing and knows no report.

Drawing is free of matplotlib's global state and of its configuration files, so equal input gives equal bytes under one
version of matplotlib.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from io import BytesIO
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font

WIDTH_PX = 1200
DPI = 120
STYLE: Mapping[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 8.0,
    "axes.titlesize": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e3e3e3",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.edgecolor": "#888888",
    "axes.linewidth": 0.8,
    "lines.linewidth": 1.4,
    "legend.frameon": False,
    # titles come from recipes and machines: a dollar sign in them is a dollar sign
    "text.parse_math": False,
    "savefig.dpi": DPI,
}


def png(draw: Callable[[], Figure]) -> bytes:
    """The PNG of the figure that `draw` makes, in the style of all figures."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(STYLE)
        figure = draw()
        FigureCanvasAgg(figure)
        file = BytesIO()
        figure.savefig(file, format="png", metadata={"Software": None})
        return file.getvalue()


def drawable(text: str) -> str:
    """Text that the font can draw: anything else is a question mark, as a missing glyph would only raise a warning."""
    known = get_font(findfont(FontProperties(family="DejaVu Sans"))).get_charmap()
    return "".join(char if char == "\n" or ord(char) in known else "?" for char in text)

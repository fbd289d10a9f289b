"""How the pictures of the examples look."""

from typing import Any

COLOURS = "#3B6FB6", "#4FA3A5", "#E07B39", "#8E5EA2", "#A89A2E", "#C44E6B"
INK, FAINT = "#33373D", "#8A8F98"
STYLE: dict[Any, Any] = {
    "savefig.dpi": 160,
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 8,
}

"""Pictures of a report as data URIs, so that the page needs no other file."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

INK, GRID, ACCENT = "#2b2f36", "#e4e6ea", ("#2f6db5", "#d0663a", "#4c9a6a", "#8a63b0", "#b59a2f", "#5d7783")
CLASSES = (*ACCENT, "#c2508a", "#3aa5b3", "#7d5a3c", "#9aa53a")
SHAPES = (("o", "●"), ("s", "■"), ("^", "▲"), ("D", "◆"), ("v", "▼"), ("*", "★"))
DISPLAY_SIZE = 192  # pixels; small frames are enlarged to it by whole factors

Series = Mapping[str, Sequence[tuple[float, float]]]


def _svg_uri(figure: Any) -> str:
    """A figure as an SVG data URI, the same bytes each time: matplotlib's ids are salted anew without a salt."""
    from matplotlib import rc_context

    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": "deepmsi"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    return _uri("image/svg+xml", buffer.getvalue())


def _uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def image_uri(pixels: NDArray[np.uint8]) -> str:
    """Encode pixels [H, W, 3] uint8 as a JPEG data URI."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "JPEG", quality=88, subsampling=0)
    return _uri("image/jpeg", buffer.getvalue())


def frame_pixels(frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Turn a stored frame [3, S, S] uint8 into pixels [H, W, 3], enlarged where it is small."""
    pixels = np.asarray(frame).transpose(1, 2, 0)
    factor = max(1, round(DISPLAY_SIZE / pixels.shape[0]))
    return pixels.repeat(factor, 0).repeat(factor, 1)


def tokens_over_frame(frame: NDArray[np.uint8], kept: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Draw kept tokens over a frame as in Figure 4 of the paper: what was dropped is washed out.

    Args:
        frame: [3, S, S] uint8.
        kept: [h, w] bool over the token grid.

    Returns:
        pixels [H, W, 3] uint8, with a thin line between the tokens.
    """
    pixels = frame_pixels(frame).astype(np.float32)
    size, grid = pixels.shape[0], kept.shape
    rows, columns = np.arange(size) * grid[0] // size, np.arange(pixels.shape[1]) * grid[1] // pixels.shape[1]
    mask = kept[rows][:, columns][..., None]
    washed = 0.12 * pixels.mean(axis=2, keepdims=True) + 0.88 * 246
    out = np.where(mask, pixels, washed)
    out[np.flatnonzero(np.diff(rows)) + 1] *= 0.93
    out[:, np.flatnonzero(np.diff(columns)) + 1] *= 0.93
    return out.clip(0, 255).astype(np.uint8)


@dataclass(frozen=True)
class Mark:
    """How a map shows a class: its colour, and its shape as matplotlib and as text name it."""

    name: str
    colour: str
    marker: str
    glyph: str


def class_marks(names: Sequence[str]) -> list[Mark]:
    """A colour and a shape for each class, together different for thirty, so that colour alone decides nothing."""
    return [Mark(name, CLASSES[k % len(CLASSES)], *SHAPES[k % len(SHAPES)]) for k, name in enumerate(names)]


def scatter_uri(
    points: NDArray[np.float64], classes: Sequence[str], right: NDArray[np.bool_], marks: Sequence[Mark]
) -> str:
    """Plot points [n, 2] by class as an SVG data URI; wrongly predicted ones are hollow. The page has the legend.

    Args:
        points: [n, 2].
        classes: the true class of each.
        right: [n], whether it was predicted.
        marks: how each class is shown.
    """
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.8), layout="constrained")
    FigureCanvasSVG(figure)
    axes: Any = figure.add_subplot()
    names = np.asarray(classes)
    size = float(np.clip(12000 / max(len(points), 1), 34, 90))
    for mark in marks:
        for mine, face in (((names == mark.name) & right, mark.colour), ((names == mark.name) & ~right, "none")):
            axes.scatter(
                points[mine, 0],
                points[mine, 1],
                s=size,
                linewidths=1.5,
                edgecolors=mark.colour,
                facecolors=face,
                alpha=0.85,
                marker=mark.marker,
            )
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color(GRID)
    return _svg_uri(figure)


def curve_uri(lines: Series) -> str:
    """Plot one quantity over the epochs, a colour for each split, as an SVG data URI.

    Args:
        lines: {split: [(epoch, value), ...]}; the folds of a protocol, "train, fold 3", are faint lines of one colour.
    """
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    # A figure of its own, not pyplot: no global state, no display.
    figure = Figure(figsize=(3.5, 2.4), layout="constrained")
    FigureCanvasSVG(figure)
    axes: Any = figure.add_subplot()
    splits: dict[str, list[Sequence[tuple[float, float]]]] = {}
    for name, points in lines.items():
        splits.setdefault(name.partition(", fold")[0], []).append(points)
    order = [*dict.fromkeys(["train", "dev", *splits])]
    for split, folds in splits.items():
        colour = ACCENT[order.index(split) % len(ACCENT)]
        for points in folds:
            x, y = zip(*sorted(points), strict=True)
            one = len(folds) == 1
            marker = "o" if len(x) == 1 else None
            axes.plot(x, y, color=colour, alpha=1 if one else 0.45, linewidth=1.6 if one else 1.1, marker=marker)
        # A name of its own: matplotlib reads $...$ as a formula.
        axes.plot([], [], color=colour, linewidth=1.6, label=split.replace("$", r"\$"))
    axes.set_xlabel("epoch", fontsize=9, color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
    _quiet(axes)
    if [*splits] != ["train"]:
        # Above the plot, where it covers no line.
        box = {"loc": "lower right", "bbox_to_anchor": (1.0, 1.0), "ncols": len(splits), "borderaxespad": 0.2}
        axes.legend(fontsize=8, frameon=False, labelcolor=INK, handlelength=1.4, columnspacing=1.2, **box)
    return _svg_uri(figure)


def reliability_uri(bins: Sequence[Mapping[str, float]]) -> str:
    """Plot the accuracy of the rows of each bin of confidence against their mean confidence, as an SVG data URI.

    Args:
        bins: `n`, `confidence` and `accuracy` of each; the area of a mark grows with n.
    """
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.5, 3.2), layout="constrained")
    FigureCanvasSVG(figure)
    axes: Any = figure.add_subplot()
    axes.plot([0, 1], [0, 1], color=GRID, linewidth=1.6)
    confidence, accuracy, n = ([b[key] for b in bins] for key in ("confidence", "accuracy", "n"))
    axes.plot(confidence, accuracy, color=ACCENT[0], linewidth=1.1, alpha=0.45)
    axes.scatter(
        confidence, accuracy, s=12 + 200 * np.asarray(n) / sum(n), color=ACCENT[0], linewidths=0, clip_on=False
    )
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.set_xlabel("confidence", fontsize=9, color=INK)
    axes.set_ylabel("accuracy", fontsize=9, color=INK)
    _quiet(axes)
    return _svg_uri(figure)


def _quiet(axes: Any) -> None:
    """Leave of a plot's frame a faint grid and the numbers beside it."""
    axes.tick_params(labelsize=8, colors=INK, length=0)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_visible(False)

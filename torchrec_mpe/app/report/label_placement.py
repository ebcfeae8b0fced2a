"""Direct labels that do not overlap each other, the points or the frame."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from numpy.typing import NDArray

from torchrec_mpe.app.report.style import FAINT

_RADII = (9, 14, 20, 28, 38, 50, 64, 80, 98, 118, 140)
_ANGLES = tuple(math.radians(a) for a in (0, 180, 90, 270, 30, 330, 150, 210, 60, 300, 120, 240))
_PASSES = 3
_LEADER_FROM = 15.0  # points between a label and its mark before a line joins them


@dataclass(frozen=True)
class DirectLabel:
    """A text beside the mark at ``x``, ``y`` (data coordinates)."""

    x: float
    y: float
    text: str
    colour: tuple[float, float, float]


def _overlap(box: NDArray[np.float64], others: NDArray[np.float64]) -> float:
    """Area that ``box`` [4] (left, bottom, right, top) shares with ``others`` [n, 4]."""
    if not len(others):
        return 0.0
    width = np.minimum(box[2], others[:, 2]) - np.maximum(box[0], others[:, 0])
    height = np.minimum(box[3], others[:, 3]) - np.maximum(box[1], others[:, 1])
    return float((np.clip(width, 0, None) * np.clip(height, 0, None)).sum())


def _segment_boxes(start: tuple[float, float], end: tuple[float, float], pieces: int = 12) -> NDArray[np.float64]:
    """A line as small boxes [pieces, 4], so that crossings can be counted as overlaps."""
    along = np.linspace(0, 1, pieces)[:, None]
    centres = np.asarray(start) * (1 - along) + np.asarray(end) * along
    return np.hstack([centres - 1.5, centres + 1.5])


def place_labels(
    axes: Axes, labels: Sequence[DirectLabel], obstacles: NDArray[np.float64], lines: NDArray[np.float64]
) -> None:
    """Draw each label where it hides least, joined to its mark by a thin line if it had to move away.

    Args:
        axes (Axes): limits and layout must be final.
        labels (Sequence[DirectLabel]): texts and their marks.
        obstacles (NDArray): [n, 4] boxes in pixels that no label may cover, such as marks.
        lines (NDArray): [n, 4] boxes in pixels that a label had better not cover, such as grid lines.
    """
    figure = axes.figure
    canvas = figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    renderer = canvas.get_renderer()
    pixels = figure.dpi / 72.0
    frame = axes.get_window_extent(renderer)
    marks = [tuple(axes.transData.transform((item.x, item.y))) for item in labels]
    texts = [
        axes.text(0, 0, item.text, color=item.colour, fontsize=9, ha="center", va="center", transform=None, zorder=6)
        for item in labels
    ]
    sizes = [
        (box.width + 4 * pixels, box.height + 2 * pixels) for box in (t.get_window_extent(renderer) for t in texts)
    ]
    boxes: list[NDArray[np.float64] | None] = [None] * len(labels)
    leaders: list[NDArray[np.float64]] = [np.empty((0, 4))] * len(labels)

    def cost(i: int, box: NDArray[np.float64], radius: float, leader: NDArray[np.float64]) -> float:
        outside = max(frame.x0 - box[0], 0) + max(frame.y0 - box[1], 0) + max(box[2] - frame.x1, 0)
        outside += max(box[3] - frame.y1, 0)
        placed = [other for j, other in enumerate(boxes) if other is not None and j != i]
        others = np.array(placed) if placed else np.empty((0, 4))
        crossed = np.vstack([leaders[j] for j in range(len(labels)) if j != i] or [np.empty((0, 4))])
        total = 1000.0 * float(outside) + 50.0 * _overlap(box, others) + 30.0 * _overlap(box, obstacles)
        total += 2.0 * _overlap(box, lines) + 20.0 * _overlap(box, crossed) + radius * 4.0
        crossing = sum(20.0 * _overlap(piece, others) + 4.0 * _overlap(piece, obstacles) for piece in leader)
        return total + crossing

    def best(i: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        (x, y), (width, height) = marks[i], sizes[i]
        found: tuple[float, NDArray[np.float64], NDArray[np.float64]] | None = None
        for radius in _RADII:
            for order, angle in enumerate(_ANGLES):
                cx = x + math.cos(angle) * (radius * pixels + width / 2)
                cy = y + math.sin(angle) * (radius * pixels + height / 2)
                box = np.array([cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2])
                nearest = (min(max(x, box[0]), box[2]), min(max(y, box[1]), box[3]))
                far = math.hypot(nearest[0] - x, nearest[1] - y) > _LEADER_FROM * pixels
                leader = _segment_boxes((x, y), nearest)[2:] if far else np.empty((0, 4))
                total = cost(i, box, radius * pixels, leader) + order
                if found is None or total < found[0]:
                    found = (total, box, leader)
        assert found is not None
        return found[1], found[2]

    order = sorted(range(len(labels)), key=lambda i: marks[i])
    for _ in range(_PASSES):
        for i in order:
            boxes[i], leaders[i] = best(i)
    for text, mark, box, leader in zip(texts, marks, boxes, leaders, strict=True):
        assert box is not None
        text.set_position(((box[0] + box[2]) / 2, (box[1] + box[3]) / 2))
        if len(leader):
            nearest = (min(max(mark[0], box[0]), box[2]), min(max(mark[1], box[1]), box[3]))
            (line,) = axes.plot(
                [mark[0], nearest[0]], [mark[1], nearest[1]], color=FAINT, lw=0.7, transform=None, zorder=4
            )
            line.set_clip_on(False)

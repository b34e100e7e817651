"""Names beside points of a scatter plot, none on top of another."""

from __future__ import annotations

PLAIN = {"parse_math": False}  # a dollar sign in a name is a dollar sign


def place_labels(figure, axes, points, labels, colours) -> None:
    """A label beside each point, on the first side where it covers nothing."""
    figure.canvas.draw()  # lays the axes out, so that points have pixel positions
    renderer = figure.canvas.get_renderer()
    frame = axes.get_window_extent(renderer)
    pixels = axes.transData.transform(points)
    margin = 6 * figure.dpi / 72
    taken = []
    for point, text, colour in zip(points, labels, colours, strict=True):
        for dx, dy, ha, va in _SIDES:
            label = axes.annotate(
                text,
                point,
                xytext=(dx, dy),
                textcoords="offset points",
                ha=ha,
                va=va,
                fontsize=8.5,
                color=colour,
                **PLAIN,
            )
            box = label.get_window_extent(renderer)
            clear = not any(box.overlaps(other) for other in taken) and not any(
                box.x0 - margin < x < box.x1 + margin
                and box.y0 - margin < y < box.y1 + margin
                for x, y in pixels
                if (x, y) != tuple(axes.transData.transform(point))
            )
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1
            if (clear and inside) or (dx, dy, ha, va) == _SIDES[-1]:
                taken.append(box)
                break
            label.remove()


_SIDES = (
    (8, 5, "left", "bottom"),
    (8, -5, "left", "top"),
    (-8, 5, "right", "bottom"),
    (-8, -5, "right", "top"),
    (0, 11, "center", "bottom"),
    (0, -11, "center", "top"),
    (8, 16, "left", "bottom"),
    (8, -16, "left", "top"),
    (-8, 16, "right", "bottom"),
)

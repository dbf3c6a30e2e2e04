"""Tables in plain text, and drawings in SVG."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Hashable, Iterable, Sequence
from html import escape
from math import log10
from os import PathLike
from textwrap import wrap
from typing import NamedTuple

from .events import Member

COLUMNS = 80  # of a text
NARROWEST = 8  # a column of words, before columns of numbers shrink

WIDTH, LANE, LETTER, DIGIT, MARGIN = 800, 22, 7, 8, 24  # pixels
GRAIN = 2  # pixels within which one mark is drawn; three within twice as many are a band
BAR, COLUMN, HIGHEST = 24, 4, 88  # pixels of a breakdown and its histograms
MARKS = "#3b82f6"  # a blue that stands out from white and from black
PARTS = ("#d97706", MARKS, "#8b5cf6")
FAINT = 'stroke="currentColor" stroke-opacity=".6"'
COLOURS = (  # of a drawing in a file; within a page it takes the page's
    "<style>svg{color:#1f2328;background:#ffffff}"
    "@media(prefers-color-scheme:dark){svg{color:#e6edf3;background:#0d1117}}</style>"
)
POWERS = ("100 ns", "", "10 µs", "", "1 ms", "", "100 ms", "", "10 s", "", "1,000 s")


class Lane(NamedTuple):
    """A line of a timeline."""

    title: str  # on its left
    caption: str  # on its right
    detail: str  # for a pointer over it, and for screen readers
    marks: Sequence[int]  # in order; see `thinned`
    is_open: bool  # whether there may be more


class Axis(NamedTuple):
    """The steps of a timeline."""

    start: int
    end: int  # excluded
    dividers: Sequence[int]  # steps with a line before them
    is_open: bool  # whether there may be steps from `end` on


class Drawn:
    """What a notebook shows as a drawing, with its text below."""

    def save_svg(self, path: str | PathLike[str]) -> None:
        """Write the drawing to a file. Its colours follow the reader's light or dark setting.

        Args:
            path: the file; it is replaced.

        Raises:
            OSError: the file cannot be written.

        Example:
            >>> from dloop import Loop
            >>> Loop(range(250), max_epochs=3).plan().save_svg("plan.svg")  # doctest: +SKIP
        """
        with open(path, "w", encoding="utf-8") as file:
            file.write(self._svg(True))

    def _repr_html_(self) -> str:
        return f"{self._svg(False)}<pre>{escape(str(self))}</pre>"

    def _svg(self, standalone: bool) -> str:
        raise NotImplementedError


def title_of(name: Hashable) -> str:
    """Return the name of an event in one line."""
    if isinstance(name, Member):
        return name.name
    return name if isinstance(name, str) and name.isprintable() and name.strip() else repr(name)


def table(titles: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[int]) -> str:
    """Return a table of at most 80 columns; the columns in `right` are aligned to the right."""
    rows = [titles, *rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    while sum(widths) + 2 * (len(widths) - 1) > COLUMNS:
        order = [(column not in right and w > NARROWEST, w) for column, w in enumerate(widths)]
        widths[order.index(max(order))] -= 1
    lines = []
    for row in [titles, ["-" * width for width in widths], *rows[1:]]:
        cells = [wrap(cell, width) for cell, width in zip(row, widths)]
        for line in range(max(map(len, cells))):
            texts = [cell[line] if line < len(cell) else "" for cell in cells]
            padded = [
                text.rjust(width) if column in right else text.ljust(width)
                for column, (text, width) in enumerate(zip(texts, widths))
            ]
            lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def paragraphs(mark: str, texts: Iterable[str]) -> list[str]:
    """Return the lines of texts that begin with a mark, of at most 80 columns."""
    indent = " " * len(mark)
    lines = [wrap(each, COLUMNS, initial_indent=mark, subsequent_indent=indent) for each in texts]
    return [line for paragraph in lines for line in paragraph]


def thinned(marks: Sequence[int], axis: Axis) -> tuple[int, ...]:
    """Return the first mark in each stretch of the axis that a drawing can show."""
    found, place, size, stretches = [], 0, axis.end - axis.start, WIDTH // GRAIN
    while place < len(marks) and marks[place] < axis.end:
        found.append(marks[place])
        stretch = (marks[place] - axis.start) * stretches // size
        next_stretch = axis.start - (-(stretch + 1) * size // stretches)
        place = bisect_left(marks, next_stretch, place + 1)
    return tuple(found)


def timeline(title: str, axis: Axis, lanes: Sequence[Lane], standalone: bool) -> str:
    """Return a drawing of marks on lanes; in colours of its own if it is `standalone`."""
    left = MARGIN + LETTER * max([len(lane.title) for lane in lanes])
    right = WIDTH - MARGIN - DIGIT * max([len(lane.caption) for lane in lanes])
    plot = _Plot(axis, left, right)
    top, parts = _heading(title)
    bottom = top + LANE * len(lanes)
    dividers = "".join([f"M{plot.x(number)} {top}V{bottom}" for number in axis.dividers])
    parts.append(f'<path d="{dividers}" stroke="currentColor" stroke-opacity=".2"/>')
    parts += [_lane(plot, lane, top + LANE * number) for number, lane in enumerate(lanes)]
    parts.append(_axis(plot, bottom))
    description = "; ".join([lane.detail for lane in lanes])
    return _svg(title, description, bottom + (44 if axis.is_open else 28), parts, standalone)


def breakdown(
    title: str,
    parts: Sequence[tuple[str, float]],
    histograms: Sequence[tuple[str, Sequence[tuple[float, int]]]],
    standalone: bool,
) -> str:
    """Return a drawing of a whole, in parts with shares from 0 to 1, and histograms (in ns)."""
    top, drawn = _heading(title)
    left = 8.0
    for number, ((text, share), colour) in enumerate(zip(parts, PARTS)):
        x, y, width = 8 + number * WIDTH // len(parts), top + BAR + 10, (WIDTH - 16) * share
        drawn += [
            f'<rect x="{left:.1f}" y="{top}" width="{width:.1f}" height="{BAR}" fill="{colour}"/>',
            f'<rect x="{x}" y="{y}" width="10" height="10" rx="2" fill="{colour}"/>',
            _text(x + 16, y + 10, text),
        ]
        left += width
    top += BAR + 38
    for number, (text, counts) in enumerate(histograms):
        drawn.append(_histogram(text, counts, MARGIN + number * WIDTH // len(histograms), top))
    description = "; ".join([*[text for text, _ in parts], *[text for text, _ in histograms]])
    return _svg(title, description, top + HIGHEST + 50, drawn, standalone)


class _Plot:
    """Where the steps of an axis are, between two sides in pixels."""

    def __init__(self, axis: Axis, left: int, right: int) -> None:
        self.axis, self.left, self.right = axis, left, right
        self.size = axis.end - axis.start

    def x(self, step: float) -> str:
        share = (step - self.axis.start) / self.size
        return f"{self.left + (self.right - self.left) * share:.1f}".removesuffix(".0")


def _lane(plot: _Plot, lane: Lane, top: int) -> str:
    middle, title = top + LANE // 2, lane.title
    dashes = ' stroke-dasharray="2 4"' if lane.is_open else ""
    return (
        f"<g><title>{_escaped(lane.detail)}</title>"
        f'<rect x="0" y="{top}" width="{WIDTH}" height="{LANE}" fill-opacity="0"/>'
        f"{_text(plot.left - 8, middle + 4, title, anchor='end')}"
        f'<path d="M{plot.left} {middle}H{plot.right}" stroke="currentColor" '
        f'stroke-opacity=".35"{dashes}/>{_marks(plot, lane.marks, middle)}'
        f"{_text(WIDTH - 8, middle + 4, lane.caption, anchor='end')}</g>"
    )


def _marks(plot: _Plot, marks: Sequence[int], middle: int) -> str:
    close = 2 * GRAIN * plot.size / (plot.right - plot.left)
    groups: list[list[int]] = []
    for mark in marks:
        if groups and mark - groups[-1][-1] < close:
            groups[-1].append(mark)
        else:
            groups.append([mark])
    ticks = bands = ""
    for group in groups:
        if len(group) > 2:
            begin = plot.x(group[0])
            end = plot.x(min(group[-1] + max(1, close / 2), plot.axis.end))
            bands += f"M{begin} {middle - 7}H{end}v14H{begin}z"
        else:
            ticks += "".join([f"M{plot.x(mark + 0.5)} {middle - 7}v14" for mark in group])
    drawn = f'<path d="{ticks}" stroke="{MARKS}" stroke-width="1.5"/>' if ticks else ""
    return drawn + (f'<path d="{bands}" fill="{MARKS}"/>' if bands else "")


def _axis(plot: _Plot, top: int) -> str:
    axis = plot.axis
    parts = [f'<path d="M{plot.left} {top}H{plot.right}" {FAINT}/>']
    most = min(5, (plot.right - plot.left) // (len(f"{axis.end:,}") * DIGIT + MARGIN))
    distance, times = 1, 0
    while plot.size > max(1, most) * distance:  # 1, 2, 5, 10, 20 ...
        times += 1
        distance = (1, 2, 5)[times % 3] * 10 ** (times // 3)
    for number in range(-(-axis.start // distance) * distance, axis.end, distance):
        x = plot.x(number + 0.5)
        parts.append(f'<path d="M{x} {top}v5" {FAINT}/>')
        parts.append(_text(x, top + 18, f"{number:,}", anchor="middle"))
    parts.append(_text(plot.left - 8, top + 18, "step", anchor="end"))
    if axis.is_open:
        parts.append(_text(WIDTH - 8, top + 34, "the end is not known", anchor="end", size=10))
    return "".join(parts)


def _histogram(text: str, counts: Sequence[tuple[float, int]], left: int, top: int) -> str:
    """Draw how often durations came, on an axis from 100 ns to 1,000 s."""
    power = 8 * COLUMN  # pixels from one power of ten to the next
    base, columns = top + 26 + HIGHEST, [0] * 80
    for duration, count in counts:
        place = 8 * (log10(max(duration, 100)) - 2)
        columns[min(int(place), 79)] += count
    shape = path = ""
    for number, count in enumerate(columns):
        if count:
            height = max(1.0, HIGHEST * count / max(columns))
            shape += f"M{left + COLUMN * number} {base}v-{height:.1f}h{COLUMN - 1}V{base}z"
    labels = []
    for number, label in enumerate(POWERS):
        path += f"M{left + power * number} {base}v5"
        labels.append(_text(left + power * number, base + 18, label, anchor="middle", size=10))
    return (
        f"<g>{_text(left, top + 12, text, size=11)}"
        f'<path d="{shape}" fill="{MARKS}"/>{"".join(labels)}'
        f'<path d="M{left} {base}h{power * 10}{path}" {FAINT} fill="none"/></g>'
    )


def _heading(title: str) -> tuple[int, list[str]]:
    """Return where a drawing's title ends, and its lines."""
    lines = wrap(title, WIDTH // LETTER - 4)
    texts = [_text(8, 20 + 18 * number, line, weight=600) for number, line in enumerate(lines)]
    return 12 + 18 * len(lines), texts


def _svg(title: str, description: str, height: int, parts: Iterable[str], standalone: bool) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" viewBox="0 0 {WIDTH} {height}" '
        f'width="{WIDTH}" height="{height}" style="max-width:100%;height:auto" '
        'font-family="system-ui,sans-serif" font-size="12" fill="currentColor">'
        f"<title>{_escaped(title)}</title><desc>{_escaped(description)}</desc>"
        f"{COLOURS if standalone else ''}{''.join(parts)}</svg>\n"
    )


def _text(
    x: float | str, y: int, text: str, anchor: str = "start", weight: int = 400, size: int = 12
) -> str:
    return (
        f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-weight="{weight}" '
        f'font-size="{size}">{_escaped(text)}</text>'
    )


def _escaped(text: str) -> str:
    """Return text for HTML and SVG, which cannot have control characters."""
    letters = [each if each.isprintable() else "\N{REPLACEMENT CHARACTER}" for each in text]
    return escape("".join(letters))

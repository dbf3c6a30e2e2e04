"""Tables in plain text and drawings in SVG, which is plain text too."""

from __future__ import annotations

from collections import namedtuple
from html import escape
from math import log10
from textwrap import wrap
from unicodedata import east_asian_width

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from typing import NamedTuple

    class Lane(NamedTuple):
        """A line of a timeline.

        Attributes:
            title: what stands before it.
            caption: what stands behind it.
            detail: what a pointer over it shows, and a screen reader reads.
            note: what stands on it where there are no marks; or an empty string.
            next_mark: returns the first mark at or after a number, or None.
        """

        title: str
        caption: str
        detail: str
        note: str
        next_mark: Callable[[int], int | None]

    class Axis(NamedTuple):
        """The numbers from `start` to before `end`, of which a timeline has one side to the other.

        Attributes:
            unit: what is counted, such as "step".
            dividers: numbers before which there is a line.
            is_open: whether it goes on beyond `end`.
        """

        start: int
        end: int
        unit: str
        dividers: Sequence[int]
        is_open: bool

    class Part(NamedTuple):
        """A part of a whole.

        Attributes:
            title: what it is.
            caption: how much that is.
            share: of the whole, from 0 to 1.
        """

        title: str
        caption: str
        share: float

    class Histogram(NamedTuple):
        """How often durations came.

        Attributes:
            title: what lasted so long.
            caption: what stands below the title.
            counts: durations in nanoseconds, the shortest first, each with how often it came.
        """

        title: str
        caption: str
        counts: Sequence[tuple[float, int]]
else:
    # typing would take longer to import than all of dloop
    Lane = namedtuple("Lane", "title caption detail note next_mark")
    Axis = namedtuple("Axis", "start end unit dividers is_open")
    Part = namedtuple("Part", "title caption share")
    Histogram = namedtuple("Histogram", "title caption counts")

COLUMNS = 80
"""How wide a text is at most, in characters."""
FILLER = "\0"
"""Stands after wide letters while a text is laid out, so that `len` counts columns."""
NARROWEST = 8
"""How narrow a column of words becomes before one of numbers does."""

WIDTH = 800
"""How wide a drawing is, in pixels."""
LANE = 22
"""How high a lane is."""
LETTER = 7
"""How wide a letter is on an average."""
DIGIT = 8
"""How wide a digit is."""
MARGIN = 24
"""What is left free beside a lane, for its title and its caption not to touch it."""
LONGEST_TITLE = 32
"""How many letters of a lane's title are shown."""
GRAIN = 2
"""Pixels: of marks that are nearer than that, one is drawn; nearer than twice that, a band is."""
MARKS = "#3b82f6"
"""A blue that can be told from white and from black."""
PARTS = ("#d97706", MARKS, "#8b5cf6", "#059669", "#7d8590")
"""The colours of the parts of a whole, from left to right."""
BAR = 24
"""How high the bar of a whole is."""
PARTS_IN_A_ROW = 3
"""How many parts stand beside each other below it."""
COLUMN = 6
"""How wide a column of a histogram is."""
HIGHEST = 88
"""How high the highest column is."""

COLOURS = (
    "<style>svg{color:#1f2328;background:#ffffff}"
    "@media(prefers-color-scheme:dark){svg{color:#e6edf3;background:#0d1117}}</style>"
)
"""Of a drawing in a file. Within a page, it has the colours of the page's text."""


def table(titles: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[int] = ()) -> str:
    """A table of at most 80 columns. Cells that are too long go on in the next line.

    Args:
        titles: the titles of the columns.
        rows: the cells, row by row.
        right: the columns whose cells stand on the right.
    """
    rows = [[_filled(cell) for cell in row] for row in (titles, *rows)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    while sum(widths) + 2 * (len(widths) - 1) > COLUMNS:
        # Numbers come last, since they are hard to read in pieces
        order = [(column not in right and w > NARROWEST, w) for column, w in enumerate(widths)]
        widths[order.index(max(order))] -= 1
    lines = []
    for number, row in enumerate(rows):
        cells = [wrap(cell, width) for cell, width in zip(row, widths)]
        for line in range(max(map(len, cells))):
            texts = [cell[line] if line < len(cell) else "" for cell in cells]
            padded = [
                text.rjust(width) if column in right else text.ljust(width)
                for column, (text, width) in enumerate(zip(texts, widths))
            ]
            lines.append("  ".join(padded).rstrip())
        if number == 0:
            lines.append("  ".join(["-" * width for width in widths]))
    return "\n".join(lines).replace(FILLER, "")


def paragraphs(mark: str, texts: Iterable[str]) -> list[str]:
    """The lines of several texts, of at most 80 columns; each text begins with the mark."""
    indent = " " * len(mark)
    lines = []
    for text in texts:
        lines += wrap(_filled(text), COLUMNS, initial_indent=mark, subsequent_indent=indent)
    return [line.replace(FILLER, "") for line in lines]


def _filled(text: str) -> str:
    """The text with a filler after each letter that a terminal shows two columns wide."""
    return "".join([f"{each}{FILLER}" if east_asian_width(each) in "WF" else each for each in text])


def html_list(texts: Sequence[str]) -> str:
    """The texts as a list for an HTML page; nothing where there are none."""
    items = "".join([f"<li>{_escaped(text)}</li>" for text in texts])
    return f"<ul>{items}</ul>" if items else ""


def shortened(text: str, most: int) -> str:
    """The text in at most so many characters. What is too long loses its middle."""
    if len(text) <= most:
        return text
    end = (most - 3) // 2
    return f"{text[: most - 3 - end]}...{text[-end:]}"


def timeline(title: str, axis: Axis, lanes: Sequence[Lane], standalone: bool) -> str:
    """A drawing of marks on lanes, in SVG.

    Where marks are too close to be told apart there is a band, so that the drawing stays small.

    Args:
        title: what stands above, and what a screen reader reads first.
        axis: what goes from left to right.
        lanes: from the top to the bottom.
        standalone: for a file of its own, which has its own colours, light or dark as the reader
            has it. Else it has the colour of the text around it.
    """
    shown = [_filled(shortened(lane.title, LONGEST_TITLE)) for lane in lanes]
    title_letters = max(map(len, shown), default=0)
    caption_letters = max([len(lane.caption) for lane in lanes], default=0)
    left = MARGIN + title_letters * LETTER
    right = WIDTH - MARGIN - caption_letters * DIGIT
    top, parts = _heading(title)
    bottom = top + LANE * len(lanes)
    height = bottom + (44 if axis.is_open else 28)
    plot = _Plot(axis, left, right)
    divider = "".join([f"M{plot.x(number)} {top}V{bottom}" for number in axis.dividers])
    parts.append(f'<path d="{divider}" stroke="currentColor" stroke-opacity=".2"/>')
    for number, lane in enumerate(lanes):
        parts.append(_lane(plot, lane, top + LANE * number))
    parts.append(_axis(plot, bottom))
    description = "; ".join([lane.detail for lane in lanes])
    return _svg(title, description, height, parts, standalone)


def breakdown(
    title: str, parts: Sequence[Part], histograms: Sequence[Histogram], standalone: bool
) -> str:
    """A drawing of the parts of a whole, with histograms below it, in SVG.

    Args:
        title: what stands above, and what a screen reader reads first.
        parts: from left to right.
        histograms: from left to right. Durations go from one power of ten to another; of a
            duration that came at all, at least a trace is seen.
        standalone: as of a timeline.
    """
    top, drawn = _heading(title)
    left = 8.0
    for number, part in enumerate(parts):
        colour = PARTS[number % len(PARTS)]
        width = (WIDTH - 16) * part.share
        text = f"{part.title} {part.caption}"
        drawn.append(
            f'<rect x="{left:.1f}" y="{top}" width="{width:.1f}" height="{BAR}" fill="{colour}">'
            f"<title>{_escaped(text)}</title></rect>"
        )
        left += width
        row, column = divmod(number, PARTS_IN_A_ROW)
        x = 8 + column * WIDTH // PARTS_IN_A_ROW
        y = top + BAR + 10 + 18 * row
        drawn.append(f'<rect x="{x}" y="{y}" width="10" height="10" rx="2" fill="{colour}"/>')
        drawn.append(_text(x + 16, y + 10, text))
    top += BAR + 20 + 18 * -(-len(parts) // PARTS_IN_A_ROW)
    wide = WIDTH // max(1, len(histograms))
    for number, histogram in enumerate(histograms):
        drawn.append(_histogram(histogram, number * wide + 8, (number + 1) * wide - 8, top))
    texts = [*[(part.title, part.caption) for part in parts], *[each[:2] for each in histograms]]
    description = "; ".join([f"{name}: {caption}" for name, caption in texts])
    return _svg(title, description, top + 36 + HIGHEST + 28, drawn, standalone)


def _escaped(text: str) -> str:
    """The text for HTML and SVG, which cannot have control characters."""
    letters = [each if each.isprintable() else "\N{REPLACEMENT CHARACTER}" for each in text]
    return escape("".join(letters))


def _heading(title: str) -> tuple[int, list[str]]:
    """Where a drawing's title ends, and the lines of it."""
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


class _Plot:
    """Where the numbers of an axis are, between two sides in pixels."""

    def __init__(self, axis: Axis, left: int, right: int) -> None:
        self.axis = axis
        self.left = left
        self.right = right
        self.size = max(1, axis.end - axis.start)

    def x(self, number: float) -> str:
        """The place of a number."""
        share = (number - self.axis.start) / self.size
        return f"{self.left + (self.right - self.left) * share:.1f}".removesuffix(".0")

    def marks(self, next_mark: Callable[[int], int | None]) -> list[int]:
        """The first mark in each column of pixels that has any."""
        columns = (self.right - self.left) // GRAIN
        found: list[int] = []
        mark = next_mark(self.axis.start)
        while mark is not None and mark < self.axis.end:
            found.append(mark)
            column = (mark - self.axis.start) * columns // self.size
            mark = next_mark(self.axis.start - (-(column + 1) * self.size // columns))
        return found


def _lane(plot: _Plot, lane: Lane, top: int) -> str:
    middle = top + LANE // 2
    marks = plot.marks(lane.next_mark)
    note = "" if marks else lane.note
    rail = plot.left + len(note) * (LETTER - 1)
    dashes = ' stroke-dasharray="2 4"' if lane.note else ""
    return (
        f"<g><title>{_escaped(lane.detail)}</title>"
        f'<rect x="0" y="{top}" width="{WIDTH}" height="{LANE}" fill-opacity="0"/>'
        f"{_text(plot.left - 8, middle + 4, shortened(lane.title, LONGEST_TITLE), anchor='end')}"
        f'<path d="M{rail} {middle}H{plot.right}" stroke="currentColor" '
        f'stroke-opacity=".35"{dashes}/>'
        f"{_text(plot.left, middle + 4, note, size=11) if note else ''}"
        f"{_marks(plot, marks, middle)}"
        f"{_text(WIDTH - 8, middle + 4, lane.caption, anchor='end')}</g>"
    )


def _marks(plot: _Plot, marks: list[int], middle: int) -> str:
    """A tick for each mark; a band for three and more that are close."""
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
    parts = [
        f'<path d="M{plot.left} {top}H{plot.right}" stroke="currentColor" stroke-opacity=".6"/>'
    ]
    most = min(5, (plot.right - plot.left) // (len(f"{axis.end:,}") * DIGIT + MARGIN))
    distance = _round(plot.size, max(1, most))
    numbers = range(-(-axis.start // distance) * distance, axis.end, distance)
    for number in numbers:
        x = plot.x(number + 0.5)
        parts.append(f'<path d="M{x} {top}v5" stroke="currentColor" stroke-opacity=".6"/>')
        parts.append(_text(x, top + 18, f"{number:,}", anchor="middle"))
    parts.append(_text(plot.left - 8, top + 18, axis.unit, anchor="end"))
    if axis.is_open:
        parts.append(_text(WIDTH - 8, top + 34, "the end is not known", anchor="end", size=10))
    return "".join(parts)


def _histogram(histogram: Histogram, left: int, right: int, top: int) -> str:
    base = top + 36 + HIGHEST
    title, caption, counts = histogram
    parts = [
        f"<title>{_escaped(f'{title}: {caption}')}</title>",
        _text(left, top + 12, title, weight=600),
        _text(left, top + 27, caption, size=11),
    ]
    if counts:
        start = left + MARGIN
        columns = [0] * ((right - MARGIN - start) // COLUMN)
        width = COLUMN * len(columns)
        low = int(log10(min([duration for duration, _ in counts if duration], default=1)))
        size = int(log10(max(1, counts[-1][0]))) + 1 - low
        for duration, count in counts:
            # No duration at all stands in the first column
            share = (log10(duration) - low) / size if duration else 0.0
            columns[int(share * len(columns))] += count
        shape = ""
        for number, count in enumerate(columns):
            if count:
                height = max(1.0, HIGHEST * count / max(columns))
                x = start + COLUMN * number
                shape += f"M{x} {base}v-{height:.1f}h{COLUMN - 1}V{base}z"
        parts.append(f'<path d="{shape}" fill="{MARKS}"/>')
        ticks = [start + width * number // size for number in range(size + 1)]
        every = 1 + 7 * DIGIT * size // width  # as many as have room for a label
        for number in range(0, size + 1, every):
            label = _power_of_ten(low + number)
            parts.append(_text(ticks[number], base + 18, label, anchor="middle"))
        path = f"M{start} {base}h{width}" + "".join([f"M{x} {base}v5" for x in ticks])
        parts.append(f'<path d="{path}" stroke="currentColor" stroke-opacity=".6" fill="none"/>')
    return f"<g>{''.join(parts)}</g>"


def _power_of_ten(power: int) -> str:
    """So many nanoseconds, with a unit."""
    thousands = min(power // 3, 3)
    return f"{10 ** (power - 3 * thousands):,} {('ns', 'µs', 'ms', 's')[thousands]}"


def _round(size: int, most: int) -> int:
    """A round distance, of 1, 2 or 5 times a power of ten, of which at most so many fit."""
    distance, times = 1, 0
    while size > most * distance:
        distance = (1, 2, 5)[(times + 1) % 3] * 10 ** ((times + 1) // 3)
        times += 1
    return distance


def _text(
    x: float | str, y: int, text: str, anchor: str = "start", weight: int = 400, size: int = 12
) -> str:
    return (
        f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-weight="{weight}" '
        f'font-size="{size}">{_escaped(text)}</text>'
    )

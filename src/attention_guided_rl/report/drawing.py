"""Drawings of a run as inline SVG: curves, intervals, attention. Colours come from the page's style sheet, by class.

In: plain numbers and names. Out: markup that is safe in the page whatever the names hold.
"""

import math
from collections.abc import Mapping, Sequence

from markupsafe import Markup

from attention_guided_rl.report.trajectories import ArticleRows, Row
from attention_guided_rl.report.verdict import arm_label, number

Point = tuple[float, float]
SMOOTHED_FROM = 60  # points; a shorter curve is drawn as it is
LEVELS = 5  # of the shading of a token, each way
LEVEL_NATS = 0.6  # per level; report.js draws with the same
CHARACTER = 0.75  # of the font's size: mean width of a label's characters at most, whatever font the page falls back to
LONGEST_NAME = 24  # characters of an arm's name in a drawing


def element(name: str, content: str | Markup = "", **attributes: object) -> Markup:
    """Return one element; names are ours, contents and attributes are escaped unless they are markup."""
    parts = [Markup('{}="{}"').format(key.rstrip("_").replace("_", "-"), value) for key, value in attributes.items()]
    return Markup("<{0}>{1}</{2}>").format(Markup(" ").join([Markup(name), *parts]), content, Markup(name))


def short(value: float) -> str:
    """Return a number for a label: three significant digits."""
    return number(value, ".3g") if value else "0"


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Return round numbers inside [low, high], about `count` of them."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= 0.75 * raw)
    first = math.ceil(low / step - 1e-9)
    return [round(step * i, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _padded(values: Sequence[float], share: float = 0.06) -> tuple[float, float]:
    low, high = min(values), max(values)
    pad = (high - low) * share or max(abs(high) * 0.1, 1e-3)
    return low - pad, high + pad


def _line(points: Sequence[Point], class_: str) -> Markup:
    return element("polyline", points=" ".join(f"{x:.1f},{y:.1f}" for x, y in points), class_=class_)


def smooth(points: Sequence[Point]) -> list[Point]:
    """Average each point of a long curve with its neighbours, a thirtieth of the curve in all; fewer near its ends."""
    if len(points) <= SMOOTHED_FROM:
        return list(points)
    reach, ys = len(points) // 60, [y for _, y in points]
    windows = (ys[max(0, i - reach) : i + reach + 1] for i in range(len(ys)))
    return [(x, sum(window) / len(window)) for (x, _), window in zip(points, windows, strict=True)]


def text_width(texts: Sequence[str], size: float) -> int:
    """Return what the longest of these texts takes at most, in units of the drawing; `size` is that of the font."""
    return math.ceil(max(map(len, texts), default=0) * size * CHARACTER)


def curve(points: Sequence[Point], label: str, span: Point | None = None) -> Markup:
    """Draw a quantity over updates, the value where it ends written beside it; `span` is the range of its axis."""
    width, height, top, bottom = 320, 150, 8, 22
    xs, ys = [x for x, _ in points], [y for _, y in points]
    (low, high), x_low, x_span = span or _padded(ys), xs[0], (xs[-1] - xs[0]) or 1
    strong, levels = smooth(points), ticks(low, high, 3)
    end = short(strong[-1][1])
    left = max(42, 6 + text_width([short(tick) for tick in levels], 11))
    right = max(54, 8 + text_width([end], 11))

    def place(x: float, y: float) -> Point:
        across = left + (x - x_low) / x_span * (width - left - right)
        return across, top + (high - y) / (high - low) * (height - top - bottom)

    parts = []
    for tick in levels:
        y = place(x_low, tick)[1]
        parts.append(element("line", x1=left, x2=width - right, y1=f"{y:.1f}", y2=f"{y:.1f}", class_="grid"))
        parts.append(element("text", short(tick), x=left - 5, y=f"{y + 3.5:.1f}", class_="tick end"))
    parts.append(element("text", short(xs[0]), x=left, y=height - 5, class_="tick"))
    if len(xs) > 1:
        parts.append(element("text", short(xs[-1]), x=width - right, y=height - 5, class_="tick end"))
    if len(xs) > SMOOTHED_FROM:
        parts.append(_line([place(x, y) for x, y in points], "line faint"))
    parts.append(_line([place(x, y) for x, y in strong], "line trained"))
    x, y = place(*strong[-1])
    parts.append(element("circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r=3, class_="dot trained"))
    parts.append(element("text", end, x=f"{x + 7:.1f}", y=f"{y + 4:.1f}", class_="value"))
    spoken = (
        f"{label}: {short(ys[0])} at update {xs[0]:.0f}, {short(ys[-1])} at update {xs[-1]:.0f}, "
        f"between {short(min(ys))} and {short(max(ys))}"
    )
    return element("svg", _join(parts), viewBox=f"0 0 {width} {height}", role="img", aria_label=spoken, class_="curve")


def _join(parts: Sequence[Markup]) -> Markup:
    return Markup("").join(parts)


def scale(contrasts: Sequence[Mapping[str, float]]) -> tuple[float, float]:
    """Return the range that shows all intervals and 0."""
    return _padded([0, *(c[end] for c in contrasts for end in ("low", "high", "mean"))], 0.04)


def interval(contrast: Mapping[str, float], span: tuple[float, float], class_: str) -> Markup:
    """Draw a mean as a dot with its interval as whiskers, as wide as the cell it stands in."""

    def across(value: float) -> str:
        return f"{(value - span[0]) / (span[1] - span[0]) * 100:.2f}%"

    mean, low, high = (across(contrast[name]) for name in ("mean", "low", "high"))
    parts = [
        element("line", x1=across(0), x2=across(0), y1=0, y2="100%", class_="zero"),
        element("line", x1=low, x2=high, y1="50%", y2="50%", class_=f"whisker {class_}"),
        *(element("line", x1=x, x2=x, y1="30%", y2="70%", class_=f"whisker {class_}") for x in (low, high)),
        element("circle", cx=mean, cy="50%", r=4, class_=f"dot {class_}"),
    ]
    return element("svg", _join(parts), class_="interval", aria_hidden="true")


def interval_axis(span: tuple[float, float]) -> Markup:
    """Draw the numbers under a column of intervals."""
    parts = [
        element("text", short(t), x=f"{(t - span[0]) / (span[1] - span[0]) * 100:.2f}%", y=12, class_="tick middle")
        for t in ticks(*span)
    ]
    return element("svg", _join(parts), class_="interval axis", aria_hidden="true")


def arm_class(arm: str) -> str:
    """Return the class that colours an arm."""
    picker = arm.partition("/")[0]
    return picker if picker in ("trained", "untrained") else "other"


def efficiency(curves: Mapping[str, Sequence[float]]) -> Markup:
    """Draw what every arm's reader knows after 0, 1, … pairs, each line named at its end."""
    low, high = _padded([y for ys in curves.values() for y in ys])
    levels = ticks(low, high)
    names = {arm: f"{_name(arm)}  {short(ys[-1])}" for arm, ys in curves.items()}
    left = max(46, 6 + text_width([short(tick) for tick in levels], 12))
    right = 18 + text_width(list(names.values()), 12)
    top, bottom, width = 10, 34, left + 220 + right
    height = max(260, 15 * len(curves) + top + bottom)
    steps = max(max(len(ys) for ys in curves.values()) - 1, 1)

    def place(x: float, y: float) -> Point:
        across = left + x / steps * (width - left - right)
        return across, top + (high - y) / (high - low) * (height - top - bottom)

    parts = []
    for tick in levels:
        y = place(0, tick)[1]
        parts.append(element("line", x1=left, x2=width - right, y1=f"{y:.1f}", y2=f"{y:.1f}", class_="grid"))
        parts.append(element("text", short(tick), x=left - 5, y=f"{y + 3.5:.1f}", class_="tick end"))
    for tick in ticks(0, steps, 5):
        if tick == int(tick):
            parts.append(
                element("text", short(tick), x=f"{place(tick, low)[0]:.1f}", y=height - 18, class_="tick middle")
            )
    parts.append(element("text", "pairs read", x=left, y=height - 3, class_="tick"))
    shown = sorted(curves, key=lambda arm: -curves[arm][-1])
    heights = _spread([place(0, curves[arm][-1])[1] for arm in shown], 15)
    for arm, text_y in sorted(zip(shown, heights, strict=True), key=lambda item: arm_class(item[0]) != "other"):
        points = [place(x, y) for x, y in enumerate(curves[arm])]
        x, y = points[-1]
        parts.append(_line(points, f"line {arm_class(arm)}"))
        parts.append(_line([(x + 3, y), (width - right + 14, text_y)], "leader"))
        parts.append(
            element("text", names[arm], x=width - right + 18, y=f"{text_y + 4:.1f}", class_=f"name {arm_class(arm)}")
        )
    spoken = "Learning efficiency: " + "; ".join(
        f"{arm_label(arm)} from {short(curves[arm][0])} to {short(curves[arm][-1])}" for arm in shown
    )
    box = f"0 0 {width} {height}"
    return element("svg", _join(parts), viewBox=box, role="img", aria_label=spoken, class_="efficiency")


def _name(arm: str) -> str:
    label = arm_label(arm)
    return label if len(label) <= LONGEST_NAME else f"{label[: LONGEST_NAME - 1]}…"


def _spread(heights: Sequence[float], gap: float) -> list[float]:
    """Move labels apart, top to bottom, so that none covers another."""
    found: list[float] = []
    for height in heights:
        found.append(max(height, found[-1] + gap) if found else height)
    return found


def subject_letter(subject: int | None) -> str:
    """Return a letter for a subject."""
    return "" if subject is None else chr(65 + subject) if subject < 26 else str(subject)


def _cell(x: int, y: int, width: int, height: int, p: float | None) -> Markup:
    if p is None:
        return element("rect", x=x, y=y, width=width, height=height, class_="cell read")
    opacity = f"{math.sqrt(p):.2f}"
    return element("rect", x=x, y=y, width=width, height=height, class_="cell", fill_opacity=opacity)


def heat_map(row: Row, article: ArticleRows) -> Markup:
    """Draw the attention of every step over the pool, the pick marked; report.js draws the same."""
    num_steps, num_pairs = len(row.picks), len(article.keys)
    cell, line, left, bottom = max(7, min(22, 520 // num_pairs)), 18, 24, 30
    width, height = left + num_pairs * cell, num_steps * line + bottom
    parts = []
    for t, step in enumerate(row.probs):
        parts.append(element("text", str(t + 1), x=left - 6, y=t * line + 13, class_="tick end"))
        for j, p in enumerate(step):
            if p is None or p >= 0.0005:
                parts.append(_cell(left + j * cell, t * line, cell - 1, line - 1, p))
        x, y = left + row.picks[t] * cell + (cell - 1) / 2, t * line + (line - 1) / 2
        parts.append(element("circle", cx=x, cy=y, r=min(4, cell / 2 - 1), class_="pick"))
    ground = element("rect", x=left, y=0, width=num_pairs * cell - 1, height=num_steps * line - 1, class_="ground")
    for j, subject in enumerate(article.subjects):
        if cell >= 10:
            middle = f"{left + j * cell + cell / 2:.1f}"
            parts.append(
                element("text", subject_letter(subject), x=middle, y=num_steps * line + 11, class_="tick middle")
            )
    parts.append(element("text", "pairs in article order →", x=left, y=height - 3, class_="tick"))
    spoken = f"Attention of {num_steps} steps over {num_pairs} keys; read in the order " + ", ".join(
        str(pick + 1) for pick in row.picks
    )
    return element(
        "svg", _join([ground, *parts]), viewBox=f"0 0 {width} {height}", width=width, height=height, role="img",
        aria_label=spoken, class_="heat",
    )  # fmt: skip


def shade(gain: float | None) -> str:
    """Return the class of a token's shading: u1 … u5 above 0, d1 … d5 below."""
    if gain is None or abs(gain) < LEVEL_NATS / 4:
        return "u0"
    return f"{'u' if gain > 0 else 'd'}{min(LEVELS, math.ceil(abs(gain) / LEVEL_NATS))}"

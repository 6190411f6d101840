"""Wikitext to prose.

Wikitext becomes prose in four steps, whose time is bounded whatever a page holds, for anybody may write one:

1. comments, the quotes of bold and italic text, and the elements that hold no prose (references, formulas, galleries,
   tables) go;
2. one scan over `{{ }}`, `{| |}` and `[[ ]]` with a stack: tables, files and categories go, links become their label,
   templates go but for the few that hold running text (`{{convert|5|km}}` → "5 km");
3. headings go, and so do the sections that only list (See also, References, …);
4. mwparserfromhell strips the rest from the paragraphs that still hold markup, and punctuation that stood around
   removed parts is mended.
"""

import itertools
import re
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

import mwparserfromhell

MAX_WIKITEXT = 2_000_000  # characters; MediaWiki itself refuses larger pages
NO_PROSE_NAMESPACES = frozenset(("file", "image", "media", "category"))
MAX_PARSED = 4000  # characters given to mwparserfromhell at once: its time can be quadratic
MAX_KEPT = 2000  # characters of a link or template kept as text; a nested one is copied once a level

NO_PROSE_SECTIONS = {
    *("see also", "references", "external links", "further reading", "notes", "bibliography", "footnotes", "sources"),
    *("citations", "works cited", "notes and references", "references and notes"),
}
TEXT_TEMPLATES = {"nowrap", "nobold", "small", "smaller", "angbr", "nihongo", "quote", "blockquote"}
FIXED_TEMPLATES = {"ndash": "–", "mdash": "—", "snd": " – ", "spaced ndash": " – ", "nbsp": " ", "'s": "'s", "·": "·"}

_REDIRECT = re.compile(r"\s*#redirect\b[^\[\n]*\[\[([^\]|\n]+)", re.IGNORECASE)
_DISAMBIGUATION = re.compile(
    r"\{\{(?:[a-z \n_-]*disambig(?:uation)?(?:[ _-](?:page|cleanup))?"
    r"|disamb|dab|hndis|geodis|numberdis|roaddis|schooldis|hospitaldis|mil-unit-dis|mathdab)[ \n]{0,9}[|}]",
    re.IGNORECASE,
)
_COMMENT = re.compile(r"<!--.*?(?:-->|\Z)", re.DOTALL)
_NO_PROSE_TAG = re.compile(
    r"</?(?:ref|references|math|chem|ce|gallery|table|timeline|imagemap|score|hiero|syntaxhighlight|source|graph|pre"
    r"|mapframe|maplink|templatedata|inputbox|categorytree|indicator|nowiki)\b[^<>]*>",
    re.IGNORECASE,
)
_SIMPLE_REFERENCE = re.compile(r"<ref\b[^<>/]*>[^<]*</ref>")  # most of them
# Nine links in ten: a name without colon or brackets, a label without brackets. Their label is the group.
_SIMPLE_LINK = re.compile(r"\[\[(?:[^][{}|:]{1,500}\||(?![^][{}|]{0,500}:))([^][{}|]{0,500})\]\]")
# Each alternative begins with a fixed character, or the search is slow; so tables bring the end of the line before.
# In "]]]" the first bracket belongs to the label; "|}}" ends a template, not a table.
_BRACKET = re.compile(r"\{\{|\}\}|\[\[|\]\](?!\](?!\]))|\n[ \t:*]*\{\||\n[ \t]*\|\}(?!\})")
_OPENER_OF = {"}}": "{{", "]]": "[[", "|}": "{|"}
_LANGUAGE = re.compile(r"[a-z]{2,3}(?:-[a-z]+)*|simple")
_RANGE = re.compile(r"(to|and|by|or|x|[-–×])(?:\(-\))?")  # between the two numbers of {{convert}}
_QUOTES = re.compile(r"('{2,})")
_MARKED = re.compile(r"[][{}&]")  # what mwparserfromhell is for: addresses in brackets, entities, parameters
_LEFT_OVER = re.compile(r"\b(?:https?|ftp)://[^\s)\]]+|'{2,}")  # bare addresses, and quotes that were entities
_MARKUP = tuple(  # before mwparserfromhell
    (re.compile(pattern, re.IGNORECASE), replacement)
    for pattern, replacement in (
        (r"</?(?:blockquote|div|p|center|poem|li|ul|ol|hr|dl|dd|dt)\b[^<>]*>", "\n\n"),
        (r"<br\b[^<>]*>", " "),
        (r"<sup>(?<=\d<sup>)(?=[-−\d])", "^"),
        (r"</?[a-z]+(?:\s[^<>]*)?/?>", ""),
        (r"__[a-z]+__", ""),
        (r"<", "&lt;"),  # no tag is left, and on "<a <a …" the parser takes quadratic time
    )
)
# Where there may be something to mend: behind an opening bracket, or before other punctuation.
_ODD = re.compile(r"[(\[,.;:!?)\]](?:(?<=[(\[])[ ,;:)\]]|(?<=[ ,;][,.;:!?)\]]))")
_MENDS = tuple(  # after mwparserfromhell, on single spaces: on long runs of them these would take quadratic time
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"([,;])(?: ?[,;])+", r"\1"),
        (r"([(\[])[ ,;:]{1,9}", r"\1"),
        (r"[ ,;]{1,9}([)\]])", r"\1"),
        (r"(?<!\S)(?:\(\)|\[\])", ""),
        (r" +([,.;:!?])(?=[\s\")]|$)", r"\1"),
    )
)


def redirect_target(wikitext: str) -> str | None:
    """Return the title that a page redirects to, if it does."""
    redirect = _REDIRECT.match(wikitext)
    return redirect[1] if redirect else None


def is_disambiguation(wikitext: str) -> bool:
    """Return whether a page lists the meanings of its title, by its templates."""
    return _DISAMBIGUATION.search(wikitext) is not None


def clean_wikitext(wikitext: str, no_prose: frozenset[str]) -> str:
    """Return the prose of a page, paragraphs separated by an empty line.

    `no_prose`: lower-case prefixes of the links that show no text, such as `file`.
    """

    def bracket(kind: str, body: str) -> str:
        if kind == "{|" or len(body) > MAX_KEPT:
            return ""
        return _template(body) if kind == "{{" else _link(body, no_prose)

    text = _COMMENT.sub("", wikitext)
    text = "\n".join(_without_quotes(line) if "''" in line else line for line in text.split("\n"))
    text = _replace_spans(_SIMPLE_REFERENCE.sub("", text), _NO_PROSE_TAG, _element)
    text = "".join(_SIMPLE_LINK.split(text))  # what is between matches, and the group of each
    text = _replace_spans("\n" + text, _BRACKET, bracket)
    for pattern, replacement in _MARKUP:
        text = pattern.sub(replacement, text)
    paragraphs = (_plain(paragraph) for paragraph in _paragraphs(_without_headings(text.split("\n"))))
    return "\n\n".join(paragraph for paragraph in paragraphs if any(map(str.isalnum, paragraph)))


def _without_quotes(line: str) -> str:
    """Drop the quotes that make text italic (two), bold (three) or both (five), and keep apostrophes.

    As in MediaWiki: where both kinds are left open, a bold quote was an apostrophe before an italic one. Rather one
    behind a word of one letter (`L'''Aurore''`) than behind a longer one (`Eagle'''s`), and that than behind a space.
    """
    if "'''" not in line:
        return line.replace("''", "")
    pieces = _QUOTES.split(line)
    lengths = [len(quotes) for quotes in pieces[1::2]]
    kept = [1 if n == 4 else max(0, n - 5) for n in lengths]
    bold = [i for i, n in enumerate(lengths) if n in (3, 4)]
    num_both = sum(n >= 5 for n in lengths)
    if bold and (len(bold) + num_both) % 2 and (lengths.count(2) + num_both) % 2:
        kept[min(bold, key=lambda i: _apostrophe_rank(pieces[2 * i] + "'" * kept[i]))] += 1
    pieces[1::2] = ["'" * n for n in kept]
    return "".join(pieces)


def _apostrophe_rank(before: str) -> int:
    return 2 if before.endswith(" ") else 0 if before[-2:-1] == " " else 1


def _replace_spans(text: str, token: re.Pattern[str], render: Callable[[str, str], str]) -> str:
    """Replace each pair of tokens and what is between by `render(kind, between)`, inner pairs first.

    A token without partner is dropped alone, so that a forgotten bracket does not cost the rest of the page.
    """
    pieces: list[str] = []
    opened: list[tuple[str, int]] = []
    counts: Counter[str] = Counter()
    position = 0
    for match in token.finditer(text):
        pieces.append(text[position : match.start() + match[0].startswith("\n")])
        position = match.end()
        kind, step = _kind(match[0])
        if step > 0:
            opened.append((kind, len(pieces)))
            counts[kind] += 1
        elif step < 0 and counts[kind]:
            other = ""
            while other != kind:
                other, begin = opened.pop()
                counts[other] -= 1
            pieces[begin:] = [render(kind, "".join(pieces[begin:]))]
    return "".join([*pieces, text[position:]])


def _kind(token: str) -> tuple[str, int]:
    """Return what a token delimits, and 1 if it opens, −1 if it closes, 0 if it stands alone."""
    if token.startswith("<"):
        name = token.strip("</>").split()[0].lower()
        return name, 0 if token.endswith("/>") else -1 if token.startswith("</") else 1
    token = token.strip("\n \t:*")
    return (_OPENER_OF[token], -1) if token in _OPENER_OF else (token, 1)


def _element(name: str, body: str) -> str:
    """Drop an element, but keep the text of nowiki, its punctuation as entities that no later step takes for markup."""
    return re.sub(r"[^\w\s]", lambda match: f"&#{ord(match[0])};", body) if name == "nowiki" else ""


def _link(body: str, no_prose: frozenset[str]) -> str:
    prefix = body.partition(":")[0] if ":" in body else ""
    if prefix.strip().lower() in no_prose or _LANGUAGE.fullmatch(prefix):
        return ""
    return body.lstrip(":").rpartition("|")[2]


def _template(body: str) -> str:
    """Return the running text that a template holds, by name; empty for the rest."""
    name, *parameters = (part.strip() for part in body.split("|"))
    name = name.lower()
    values = [value for value in parameters if "=" not in value]
    if name in FIXED_TEMPLATES:
        return FIXED_TEMPLATES[name]
    if name in ("convert", "cvt") and len(values) > 1:
        joint = _RANGE.fullmatch(values[1])
        return " ".join([values[0], joint[1], *values[2:4]] if joint else values[:2])
    if name in ("lang", "transl") and len(values) > 1:  # language first; transl may name its standard second
        return values[-1]
    if name == "chem":
        return "".join(values)
    return values[0] if values and (name.startswith("lang-") or name in TEXT_TEMPLATES) else ""


def _without_headings(lines: Iterable[str]) -> Iterator[str]:
    """Drop heading lines, and sections in NO_PROSE_SECTIONS with all below them."""
    dropped_level = 0
    for line in lines:
        heading = line.strip()
        if len(heading) > 2 and heading[0] == heading[-1] == "=":
            level = min(len(heading) - len(heading.lstrip("=")), len(heading) - len(heading.rstrip("=")))
            if not dropped_level or level <= dropped_level:
                dropped_level = level if heading.strip("= '").lower() in NO_PROSE_SECTIONS else 0
            yield ""
        elif not dropped_level:
            yield line


def _paragraphs(lines: Iterable[str]) -> Iterator[str]:
    """Join lines of running text; a list item is a paragraph of its own; rows of broken tables go."""
    for running, group in itertools.groupby(lines, lambda line: line.strip() != "" and line[0] not in "*#:;|!"):
        if running:
            yield " ".join(group)
        else:
            yield from (line for line in group if line[:1] not in ("|", "!"))


def _plain(paragraph: str) -> str:
    text = " ".join(paragraph.split()).lstrip("*#:; ")
    if _MARKED.search(text):
        parts = textwrap.wrap(text, MAX_PARSED) if len(text) > MAX_PARSED else [text]
        text = " ".join(" ".join(str(mwparserfromhell.parse(part).strip_code()) for part in parts).split())
    if "://" in text or "''" in text:
        text = " ".join(_LEFT_OVER.sub("", text).split())
    if _ODD.search(text):
        for pattern, replacement in _MENDS:
            text = pattern.sub(replacement, text)
        text = " ".join(text.split())
    return text

"""DumpCorpus: which pages it takes, what is left of their wikitext, redirects, and how it refuses damaged dumps."""

import bz2
import logging
from pathlib import Path
from xml.sax.saxutils import escape, quoteattr

import pytest

from attention_guided_rl.config import CorpusConfig
from attention_guided_rl.data import dump, dump_xml
from attention_guided_rl.data.dump import DumpCorpus, clean_wikitext
from attention_guided_rl.errors import CorpusError
from attention_guided_rl.records import Article

SLICE = Path(__file__).parents[3] / "shared" / "data" / "enwiki-pages-articles-slice.xml.bz2"
HEAD = """<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/" version="0.11" xml:lang="nl">
  <siteinfo>
    <base>https://nl.wikipedia.org/wiki/Hoofdpagina</base>
    <namespaces>
      <namespace key="0" case="first-letter" />
      <namespace key="1" case="first-letter">Overleg</namespace>
      <namespace key="6" case="first-letter">Bestand</namespace>
    </namespaces>
  </siteinfo>
"""


def page(
    title: str,
    text: str,
    *,
    ns: str | None = "0",
    redirect: str | None = None,
    model: str = "wikitext",
    number: int = 1,
) -> str:
    return (
        f"<page><title>{escape(title)}</title>"
        + ("" if ns is None else f"<ns>{ns}</ns>")
        + f"<id>{number}</id>"
        + ("" if redirect is None else f"<redirect title={quoteattr(redirect)} />")
        + f"<revision><id>{number + 1000}</id><contributor><id>5</id></contributor><model>{model}</model>"
        + f'<text xml:space="preserve">{escape(text)}</text></revision></page>\n'
    )


def write(folder: Path, *pages: str, head: str = HEAD) -> Path:
    path = folder / "nlwiki.xml"
    path.write_text(head + "".join(pages) + "</mediawiki>", encoding="utf-8")
    return path


def places(path: Path, *, start: int = 0, title: str | None = None) -> list[Article | None]:
    return list(DumpCorpus(CorpusConfig(kind="dump", path=path, title=title)).articles(0, start))


def read(path: Path, *, title: str | None = None) -> list[Article]:
    return [article for article in places(path, title=title) if article is not None]


def titles(found: list[Article | None]) -> list[str | None]:
    return [article and article.title for article in found]


def clean(wikitext: str) -> str:
    return clean_wikitext(wikitext, frozenset(("file", "image", "category", "bestand")))


def test_article_has_all_fields(tmp_path):
    path = write(tmp_path, page("Café de Molen/Zaal?", "'''De Molen''' maalt ''graan''.", number=7))

    assert read(path) == [
        Article(
            id="page:7",
            title="Café de Molen/Zaal?",
            text="De Molen maalt graan.",
            source="dump:nlwiki.xml",
            revision="1007",
            url="https://nl.wikipedia.org/wiki/Caf%C3%A9_de_Molen/Zaal%3F",
            licence="CC BY-SA 4.0",
        )
    ]


@pytest.mark.parametrize("base", ["", "<siteinfo><base>javascript:alert(1)//</base></siteinfo>"])
def test_dump_without_a_web_address_gives_articles_without_one(tmp_path, base):
    path = write(tmp_path, page("Molen", "Een molen."), head=f"<mediawiki>{base}")

    assert [(a.url, a.text) for a in read(path)] == [("", "Een molen.")]


def test_bz2_of_several_streams_is_read_like_xml(tmp_path):
    plain = write(tmp_path, page("A", "Aap."), page("B", "Beer.")).read_bytes()
    packed = tmp_path / "nlwiki.xml.bz2"
    packed.write_bytes(bz2.compress(plain[:900]) + bz2.compress(plain[900:]))

    assert [a.text for a in read(packed)] == ["Aap.", "Beer."]
    assert read(packed)[0].source == "dump:nlwiki.xml.bz2"


NO_ARTICLES = {
    "redirect element": page("R", "", redirect="A"),
    "redirect in text": page("R", " #REDIRECT [[A]]"),
    "redirect with colon": page("R", "#redirect: [[A]]"),
    "talk": page("Overleg:A", "Talk.", ns="1"),
    "talk by name": page("overleg:A", "Talk.", ns=None),
    "disambiguation title": page("Molen (disambiguation)", "* [[A]]"),
    "disambig": page("Molen", "* [[A]]\n{{disambig}}"),
    "Disambiguation": page("Molen", "* [[A]]\n{{ Disambiguation|geo}}"),
    "airport disambiguation": page("Molen", "* [[A]]\n{{Airport disambiguation}}"),
    "hndis": page("Molen", "* [[A]]\n{{hndis|name=Molen, De}}"),
    "geodis": page("Molen", "* [[A]]\n{{Geodis}}"),
    "no text": page("Empty", ""),
    "no title": page("", "Text."),
    "no wikitext": page("Data", "{}", model="json"),
}


@pytest.mark.parametrize("other", NO_ARTICLES.values(), ids=NO_ARTICLES.keys())
def test_page_that_is_no_article_is_an_empty_place(tmp_path, other):
    path = write(tmp_path, other, page("A", "Aap."), other, page("B", "Beer."))

    assert titles(places(path)) == [None, "A", None, "B"]
    with pytest.raises(CorpusError, match=r"nlwiki\.xml: only redirects or disambiguation pages"):
        read(write(tmp_path, other))


def test_end_of_a_pass_need_not_hold_an_article(tmp_path):
    path = write(tmp_path, page("A", "Aap."), page("R", "", redirect="A"), page("S", "", redirect="A"))

    assert titles(places(path, start=1)) == [None, None]
    assert places(path, start=3) == []


def test_article_that_mentions_disambiguation_is_kept(tmp_path):
    text = "{{about|mills|others|Mill (disambiguation)}} A [[mill]]{{disambiguation needed|date=May}} grinds."

    assert [a.text for a in read(write(tmp_path, page("Mill: a story", text, ns=None)))] == ["A mill grinds."]


def test_too_large_page_is_skipped_with_a_line_in_the_log(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(dump, "MAX_WIKITEXT", 9)
    path = write(tmp_path, page("Large", "Ten signs."), page("Small", "Nine sig."))
    with caplog.at_level(logging.WARNING):
        assert titles(places(path)) == [None, "Small"]

    assert caplog.messages == [f"{path}: skipped 'Large': 10 characters of wikitext"]
    with pytest.raises(CorpusError, match="'Large' is empty or too large"):
        read(path, title="Large")


@pytest.fixture
def five(tmp_path):
    return write(tmp_path, *(page(f"T{i}", f"Text {i}.") + page(f"R{i}", "", redirect="T0") for i in range(5)))


FIVE = ["T0", None, "T1", None, "T2", None, "T3", None, "T4", None]


@pytest.mark.parametrize("start", range(12))
def test_reading_from_a_place_on_is_the_end_of_a_whole_pass(five, start):
    assert titles(places(five)) == FIVE
    assert titles(places(five, start=start)) == FIVE[start:]
    assert places(five, start=start) == places(five)[start:]


def test_going_to_a_place_cleans_nothing_before_it(five, monkeypatch):
    cleaned = []
    monkeypatch.setattr(dump, "clean_wikitext", lambda text, no_prose: cleaned.append(text) or text)
    places(five, start=6)

    assert cleaned == ["Text 3.", "Text 4."]


def test_bytes_of_xml_are_counted_over_all_passes(tmp_path):
    path = write(tmp_path, page("A", "Aap."), page("R", "", redirect="A"))
    packed = tmp_path / "nlwiki.xml.bz2"
    packed.write_bytes(bz2.compress(path.read_bytes()))
    corpus = DumpCorpus(CorpusConfig(kind="dump", path=packed))
    assert corpus.bytes_read == 0
    for passes in (1, 2):
        list(corpus.articles(passes, 0))
        assert corpus.bytes_read == passes * path.stat().st_size


@pytest.mark.parametrize("pack", [bytes, bz2.compress])
def test_bare_parse_tells_bytes_and_seconds(tmp_path, pack):
    content = write(tmp_path, page("A", "Aap."), page("B", "Beer.")).read_bytes()
    path = tmp_path / ("bare.xml" if pack is bytes else "bare.xml.bz2")
    path.write_bytes(pack(content))
    num_bytes, seconds = dump_xml.bare_parse(path)

    assert num_bytes == len(content)
    assert 0 < seconds < 5
    path.write_bytes(pack(content)[:-40])
    with pytest.raises(CorpusError, match=r"bare\.xml.*in a bare parse"):
        dump_xml.bare_parse(path)


REDIRECTS = (
    page("Mill", "", redirect="windmill#Sails"),
    page("Windmill", "#REDIRECT [[Wind mill#History|wind]]"),
    page("Post mill", "A mill on a post."),
    page("Round", "", redirect="About"),
    page("About", "", redirect="Round"),
    page("Lost", "", redirect="Post mills"),
    page("Grinder", "* [[Angle grinder]], a tool\n* [[Post mill|mill]]\n{{disambig}}"),
    *(page(f"Hop {i}", "", redirect=f"Hop {i + 1}") for i in range(9)),
    page("Wind mill", "A mill with sails."),
)


@pytest.mark.parametrize(
    ("title", "found"),
    [
        ("Post mill", "Post mill"),
        ("post_mill", "Post mill"),
        ("Windmill", "Wind mill"),
        ("Mill", "Wind mill"),
    ],
)
def test_title_is_found_and_followed_through_redirects(tmp_path, title, found):
    corpus = DumpCorpus(CorpusConfig(kind="dump", path=write(tmp_path, *REDIRECTS), title=title))

    assert [a.title for a in corpus.articles(0, 0)] == [found]
    assert [a.title for a in corpus.articles(1, 0)] == [found]
    assert list(corpus.articles(0, 1)) == []


def test_title_needs_nothing_behind_it(tmp_path):
    path = write(tmp_path, page("A", "Aap."))
    path.write_bytes(path.read_bytes()[: -len("</mediawiki>")] + b" " * 2**17 + b"<broken")

    assert [a.text for a in read(path, title="A")] == ["Aap."]


@pytest.mark.parametrize(
    ("title", "message"),
    [
        ("Round", "Round → About → Round: redirects lead nowhere"),
        ("Hop 0", "Hop 0 → Hop 1 → Hop 2 → Hop 3 → Hop 4 → Hop 5: redirects lead nowhere"),
        ("Post mil", "no page 'Post mil'; nearest: 'Post mill'"),
        ("Lost", "no page 'Lost' → 'Post mills'; nearest: 'Post mill'"),
        ("Zzz", "no page 'Zzz'; none is near it"),
        ("Grinder", "'Grinder' has several meanings; set corpus.title to one: Angle grinder, Post mill"),
    ],
)
def test_title_that_leads_to_no_article_is_refused_with_suggestions(tmp_path, title, message):
    with pytest.raises(CorpusError) as caught:
        read(write(tmp_path, *REDIRECTS), title=title)

    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def absent(folder: Path) -> Path:
    return folder / "nlwiki.xml"


def folder_itself(folder: Path) -> Path:
    return folder


def other_type(folder: Path) -> Path:
    return write(folder, page("A", "Aap.")).rename(folder / "nlwiki.7z")


def empty(folder: Path) -> Path:
    (folder / "nlwiki.xml").touch()
    return folder / "nlwiki.xml"


def truncated_xml(folder: Path) -> Path:
    path = write(folder, page("A", "Aap."), page("B", "Beer."))
    path.write_bytes(path.read_bytes()[:-40])
    return path


def truncated_bz2(folder: Path) -> Path:
    packed = folder / "nlwiki.xml.bz2"
    packed.write_bytes(bz2.compress(write(folder, page("A", "Aap.")).read_bytes())[:-40])
    return packed


def second_stream(folder: Path) -> tuple[bytes, bytes]:
    pages = write(folder, page("A", "Aap."), page("R", "", redirect="A"), page("B", "Beer.")).read_bytes()
    cut = pages.index(b"<page><title>B")
    return bz2.compress(pages[:cut]), bz2.compress(pages[cut:])


def truncated_second_stream(folder: Path) -> Path:
    first, second = second_stream(folder)
    (folder / "nlwiki.xml.bz2").write_bytes(first + second[:-20])
    return folder / "nlwiki.xml.bz2"


def damaged_second_stream(folder: Path) -> Path:
    first, second = second_stream(folder)
    (folder / "nlwiki.xml.bz2").write_bytes(first + second[:20] + b"damage" + second[26:])
    return folder / "nlwiki.xml.bz2"


def damaged_bz2(folder: Path) -> Path:
    return write(folder, page("A", "Aap.")).rename(folder / "nlwiki.xml.bz2")


def not_utf8(folder: Path) -> Path:
    path = write(folder, page("A", "Aap."), page("B", "Beer."))
    path.write_bytes(path.read_bytes().replace(b"Beer", b"B\xe9er"))
    return path


def nul(folder: Path) -> Path:
    path = write(folder, page("A", "Aap."), page("B", "Beer."))
    path.write_bytes(path.read_bytes().replace(b"Beer", b"B\0er"))
    return path


def lone_surrogate(folder: Path) -> Path:
    path = write(folder, page("A", "Aap."), page("B", "Beer."))
    path.write_bytes(path.read_bytes().replace(b"Beer", b"B&#xD800;er"))
    return path


def web_page(folder: Path) -> Path:
    return write(folder, head="<html><mediawiki>")


def entities(folder: Path) -> Path:
    bomb = '<!DOCTYPE mediawiki [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">]>'
    return write(folder, page("A", "Aap."), head="<!-- -->" + bomb + HEAD)


def entities_in_utf16(folder: Path) -> Path:
    path = entities(folder)
    path.write_text(path.read_text("utf-8"), encoding="utf-16")
    return path


def bomb_in_page(folder: Path) -> Path:
    packed = folder / "nlwiki.xml.bz2"
    packed.write_bytes(bz2.compress(HEAD.encode() + b"<page><text>" + b"a" * 2**21))
    return packed


def bomb_before_root(folder: Path) -> Path:
    packed = folder / "nlwiki.xml.bz2"
    packed.write_bytes(bz2.compress(b" " * 2**21 + HEAD.encode()))
    return packed


ERRORS = {
    absent: "no such file",
    folder_itself: "no such file",
    other_type: "neither .xml nor .bz2",
    empty: "the file is empty (before the first page)",
    truncated_xml: "(after 1 pages, the last 'A'); download the dump again",
    truncated_bz2: "ended before the end-of-stream marker",
    truncated_second_stream: "(after 2 pages, the last 'R'); download the dump again",
    damaged_second_stream: "(after 2 pages, the last 'R'); download the dump again",
    damaged_bz2: "Invalid data stream (before the first page)",
    not_utf8: "(after 1 pages, the last 'A')",
    nul: "(after 1 pages, the last 'A')",
    lone_surrogate: "(after 1 pages, the last 'A')",
    web_page: "its root element is 'html'",
    entities: "declares a document type",
    entities_in_utf16: "declares a document type",
    bomb_in_page: "no page ends within 1048576 bytes",
    bomb_before_root: "no element begins within 262144 bytes",
}


@pytest.mark.parametrize(("make", "message"), ERRORS.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_unusable_dump_is_refused_in_one_line_that_names_it(tmp_path, monkeypatch, make, message):
    monkeypatch.setattr(dump_xml, "MAX_PAGE", 2**20)
    path = make(tmp_path)
    with pytest.raises(CorpusError) as caught:
        read(path)

    assert caught.value.exit_code == 3
    assert str(path) in str(caught.value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("wikitext", "prose"),
    [
        # text
        ("'''''Mills''''' ''grind''.", "Mills grind."),
        ("One\nline.\n\n\n\nNext &amp; last&nbsp;one.", "One line.\n\nNext & last one."),
        ("* one\n** two\n# three\n: four\n; five", "one\n\ntwo\n\nthree\n\nfour\n\nfive"),
        ("Running\n* item\nrunning on", "Running\n\nitem\n\nrunning on"),
        ("a<br />b <span style='x'>c</span> H<sub>2</sub>O 10<sup>6</sup>", "a b c H2O 10^6"),
        ("<blockquote>Said\nso.</blockquote>Indeed.", "Said so.\n\nIndeed."),
        ("__NOTOC__Mill.", "Mill."),
        ("1 < 2, 3 > 2, a<b", "1 < 2, 3 > 2, a<b"),
        ("A <nowiki>[[b]] {{c}} ''d''</nowiki> e", "A [[b]] {{c}} d e"),
        ("Call f() now.", "Call f() now."),
        # quotes: of two kinds left open on a line, one bold quote is an apostrophe
        ("''Eagle'''s crew.", "Eagle's crew."),
        ("He read L'''Aurore''.\n''One'' '''two\n''three", "He read L'Aurore. One two three"),
        ("x '''a ''bb'''c d'''e\nx '''a ''bb'''c '''d", "x a bbc d'e x a bb'c d"),
        ("x '''a ''b", "x 'a b"),
        ("''''Mills'''' grind, '''a''''s too, ''''''b'''''.", "'Mills' grind, a's too, 'b."),
        ("''a''<sub>''i''</sub>{{b}}''c''", "aic"),
        # links
        ("A [[mill]]er at [[Sea (water)|the sea]] and [[:Category:Mills|mills]].", "A miller at the sea and mills."),
        ("A[[File:a.jpg|thumb|A [[mill]] [http://b c]]] b[[image:c.png]][[Category:D]]", "A b"),
        ("A[[Bestand:a.jpg|duim|Een [[molen]]]][[fr:Moulin]][[zh-yue:Moulin]].", "A."),
        ("See [https://example.org/a the page], [https://example.org] or https://example.org/b.", "See the page, or"),
        ("A [[File:a.jpg|b]][[fr:c|d]]mill[[e|f: g]] [[a|b|c]].", "A millf: g c."),
        # templates and tables
        ("A{{cite|b={{c|d}}|e=[[f|g]]}} mill{{h}}.", "A mill."),
        ("{{Infobox\n| a = {| class=x\n| b\n|}\n}}A mill.", "A mill."),
        ("A\n{| class=x\n|-\n| b || {{c|}}\n{| \n| d\n|}\n|}\nmill.", "A\n\nmill."),
        ("A <table><tr><td>b<table></table></td></tr></table>mill.", "A mill."),
        ("{{convert|5|km|mi}}, {{cvt|2|to|3|kg}}, {{convert|60|and(-)|80|kg|lb}}", "5 km, 2 to 3 kg, 60 and 80 kg"),
        ("{{lang|fr|moulin}}, {{lang-de|Mühle}}, {{transl|ar|DIN|ṭāḥūna}}", "moulin, Mühle, ṭāḥūna"),
        ("{{nowrap|a [[mill|b]]}}{{ndash}}c, {{chem|H|2|O}}", "a b–c, H2O"),
        # references, formulas, comments
        ("A<ref>b {{c}}</ref> mill<ref name=d /><ref name='e'>f</ref>.", "A mill."),
        ("A<ref name=a /> mill</ref><REF NAME='b/c'>d</REF>.", "A mill."),
        ("A<!-- b {{c --> mill<math>x^{2_{y}}</math><gallery>\nFile:d.jpg|e\n</gallery>.", "A mill."),
        # punctuation around what is gone
        ("Mill ({{a}}; {{b}}, from ''molen'') , ({{c}}) ({{d}}, ) .", "Mill (from molen),."),
        ("Mill ({{a}}) grinds, {{b}}, corn {{c}}; ... and [{{d}}] more", "Mill grinds, corn; ... and more"),
        # headings and sections
        ("Lead.\n== A ==\nText.\n===B===\nMore.", "Lead.\n\nText.\n\nMore."),
        ("Lead.\n==See also==\n* [[a]]\n=== b ===\nc\n== D ==\nText.\n== ''References'' ==\ne", "Lead.\n\nText."),
        ("Lead.\n=== Notes ===\na\n==== b ====\nc\n== D ==\nText.", "Lead.\n\nText."),
        # damage
        ("A {{b mill [[c ''d <ref> e", "A b mill c d e"),
        ("A }} mill ]] b </ref> c\n|}\nd", "A mill b c\n\nd"),
        ("A <ref>b <ref>c</ref> d {{e {{f}} g", "A b d e g"),
        ("A\n| row\n! head\nmill <!-- b", "A\n\nmill"),
    ],
)
def test_wikitext_becomes_prose(wikitext, prose):
    assert clean(wikitext) == prose


@pytest.mark.timeout(60)  # quadratic cleaning takes minutes here, linear cleaning about a second
def test_hostile_wikitext_takes_bounded_time():
    brackets = ("{{", "[[", "{|\n", "{{nowrap|", "[[a|", "[http://a ", "<ref>", "<ref name=a", "<!--", "<nowiki>")
    for piece in (*brackets, "<a ", "<", "'''a'''b", "http://a ", " ", ", ", "(", "#", "=\n", "&#"):
        wikitext = piece * 2000 + "}}" * 1000 + "]]" * 1000
        prose = clean(wikitext)
        assert len(prose) <= len(wikitext), piece
        assert "{{" not in prose, piece


def test_real_dump_becomes_prose():
    if not SLICE.exists():
        pytest.skip(f"{SLICE} is not here")
    articles = read(SLICE)

    assert len(articles) > 80
    anarchism = next(a for a in articles if a.title == "Anarchism")
    assert anarchism.url == "https://en.wikipedia.org/wiki/Anarchism"
    assert anarchism.text.startswith("Anarchism is a ")
    for article in articles:
        assert article.text
        for markup in ("{{", "}}", "[[", "]]", "|}", "{|", "<ref", "</", "''", "==", "http://", " ()", "( ", " )"):
            assert markup not in article.text, f"{markup!r} in {article.title}"


def test_title_behind_a_redirect_of_the_real_dump_is_found():
    if not SLICE.exists():
        pytest.skip(f"{SLICE} is not here")

    assert [a.title for a in read(SLICE, title="AfroAsiaticLanguages")] == ["Afroasiatic languages"]

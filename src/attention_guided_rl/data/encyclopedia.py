"""The generated encyclopedia: procedural articles about invented places, people and guilds.

In: a variant, sizes and a seed. Out: an endless, seekable sequence of Articles whose pairs carry `subject` labels.

Every article draws fresh names, and a fact recurs only inside its article, so a small language model can predict a
value only from what it has read. Pairs are interleaved at random: article order is not the answer. A pair reads

    key    "What the seal of Velor Ashdale keeps:"                          (8 tokens of the bundled tokenizer)
    value  "Velor Ashdale amber heron copper barley fog lute lantern."      (10 tokens)

that is, the name, the subject's six attributes, and one detail of the pair's own that nothing predicts. What the
planted structure is, and which pick it makes best, depends on the variant:

- `threads`: all pairs of a subject share its attributes. Best: stay on the subject while it has unread pairs.
- `needle`:  one pair (subject 0), about a guild, lists six attributes; explained pairs (subject 1), about its people,
             each repeat three of them among details; filler (subject 2), about places, is unrelated. Best: the needle
             first, then what it explains. Keys say which is which, as headings do: a query can ask for a kind.
- `chain`:   link j+1 has link j's attributes but one, and link j's value names link j+1. Best: in link order.
- `null`:    the same surface as `threads`, every value drawn independently of every other pair and of its own key.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from attention_guided_rl.config import CorpusConfig
from attention_guided_rl.records import Article, PairText

VARIANTS = ("threads", "needle", "chain", "null")
STAY_VARIANTS = ("threads", "null")  # planted rule: stay on the subject; otherwise: lowest label first

FIRST_NAMES = tuple(
    a + b
    for a in ("Vel", "Or", "Mar", "Tas", "Bren", "Cal", "Dun", "Fen")
    for b in ("a", "ic", "or", "und", "eth", "iel", "om", "ys")
)
LAST_NAMES = tuple(
    a + b
    for a in ("Thorn", "Ash", "Mere", "Holt", "Wyn", "Crag", "Lark", "Stane")
    for b in ("by", "dale", "ford", "gate", "mont", "ric", "shaw", "well")
)
ATTRIBUTES = tuple(
    tuple(words.split())
    for words in (
        "amber crimson indigo ivory olive russet scarlet silver teal umber violet white",
        "badger crane falcon heron lynx marten otter raven stag swan viper wolf",
        "basalt bronze copper flint granite iron jade marble pewter quartz slate tin",
        "barley clover flax hops lentils millet oats onions plums rye saffron wheat",
        "drizzle fog frost gales hail haze mist rain sleet snow squalls thunder",
        "bells bugle cymbal drum fiddle flute harp horn lute lyre pipes zither",
    )
)
DETAILS = tuple(
    "anchor basket candle dagger easel feather goblet hammer inkwell jewel kettle lantern "
    "mirror needle oar pillar quill ribbon saddle thimble urn veil wheel yoke".split()
)
Kind = tuple[str, tuple[str, ...]]  # verb, roles
PLACE = ("shows", tuple("bridge chapel garden harbor market mill square tower".split()))
PERSON = ("keeps", tuple("banner herald household kitchen orchard seal stable study".split()))
GUILD = ("teaches", tuple("charter feast hall ledger lodge school vault workshop".split()))
KINDS = (PLACE, PERSON, GUILD)
MAX_PAIRS_PER_SUBJECT = len(KINDS[0][1])


@dataclass(frozen=True, slots=True)
class _Subject:
    """An invented place, person or guild: its name, its kind and its six attributes."""

    name: str
    verb: str
    roles: tuple[str, ...]
    attributes: tuple[str, ...]

    def key(self, role: str) -> str:
        return f"What the {role} of {self.name} {self.verb}:"


def _names(rng: np.random.Generator, num_names: int) -> list[str]:
    """Draw names that share no word, so that either word identifies its bearer within the article."""
    if num_names > len(FIRST_NAMES):
        raise ValueError(f"an article can have at most {len(FIRST_NAMES)} names, this one needs {num_names}")
    first = rng.permutation(len(FIRST_NAMES))[:num_names]
    last = rng.permutation(len(LAST_NAMES))[:num_names]
    return [f"{FIRST_NAMES[i]} {LAST_NAMES[j]}" for i, j in zip(first, last, strict=True)]


def _attributes(rng: np.random.Generator) -> tuple[str, ...]:
    return tuple(words[rng.integers(len(words))] for words in ATTRIBUTES)


def _subject(rng: np.random.Generator, name: str, kinds: tuple[Kind, ...] = KINDS) -> _Subject:
    verb, roles = kinds[rng.integers(len(kinds))]
    return _Subject(name, verb, tuple(rng.permutation(roles)), _attributes(rng))


def _value(rng: np.random.Generator, name: str, attributes: tuple[str, ...]) -> str:
    """The name, the attributes, and a detail of the pair's own."""
    return f"{name} {' '.join(attributes)} {DETAILS[rng.integers(len(DETAILS))]}."


def _threads(rng: np.random.Generator, subjects: int, pairs_per_subject: int) -> list[PairText]:
    pairs = []
    for label, name in enumerate(_names(rng, subjects)):
        subject = _subject(rng, name)
        for role in subject.roles[:pairs_per_subject]:
            pairs.append(PairText(subject.key(role), _value(rng, name, subject.attributes), label))
    return pairs


def _null(rng: np.random.Generator, subjects: int, pairs_per_subject: int) -> list[PairText]:
    """As `threads`, each value replaced by one about a stranger with attributes of his own."""
    pairs = _threads(rng, subjects, pairs_per_subject)
    return [PairText(p.key, _value(rng, _stranger(rng), _attributes(rng)), p.subject) for p in pairs]


def _stranger(rng: np.random.Generator) -> str:
    return f"{FIRST_NAMES[rng.integers(len(FIRST_NAMES))]} {LAST_NAMES[rng.integers(len(LAST_NAMES))]}"


def _needle(rng: np.random.Generator, subjects: int, pairs_per_subject: int) -> list[PairText]:
    num_pairs = subjects * pairs_per_subject
    guild, *names = _names(rng, num_pairs)
    facts = _attributes(rng)
    needle = _subject(rng, guild, (GUILD,))
    pairs = [PairText(needle.key(needle.roles[0]), _value(rng, guild, facts), 0)]
    for position, name in enumerate(names):
        is_explained = position % 2 == 0
        subject = _subject(rng, name, (PERSON if is_explained else PLACE,))
        if is_explained:  # three consecutive facts of the guild, then details
            start = rng.integers(len(facts) - 2)
            words = [*facts[start : start + 3], *rng.choice(DETAILS, 4)]
            pairs.append(PairText(subject.key(subject.roles[0]), f"{name} {' '.join(words)}.", 1))
        else:
            pairs.append(PairText(subject.key(subject.roles[0]), _value(rng, name, subject.attributes), 2))
    return pairs


def _chain(rng: np.random.Generator, subjects: int, pairs_per_subject: int) -> list[PairText]:
    num_pairs = subjects * pairs_per_subject
    names = _names(rng, num_pairs + 1)
    attributes = _attributes(rng)
    pairs = []
    for link, (name, successor) in enumerate(itertools.pairwise(names)):
        subject = _subject(rng, name)
        pairs.append(PairText(subject.key(subject.roles[0]), _value(rng, successor, attributes), link))
        changed = int(rng.integers(len(attributes)))
        fresh = ATTRIBUTES[changed][rng.integers(len(ATTRIBUTES[changed]))]
        attributes = (*attributes[:changed], fresh, *attributes[changed + 1 :])
    return pairs


_GENERATORS = {"threads": _threads, "needle": _needle, "chain": _chain, "null": _null}


def generate_article(
    seed: int, index: int, *, variant: str = "threads", subjects: int = 7, pairs_per_subject: int = 4
) -> Article:
    """Generate article number `index` of the encyclopedia with this seed; a pure function of its arguments.

    Raises:
        ValueError: the sizes need more names than there are.
    """
    rng = np.random.Generator(np.random.Philox(key=[seed, VARIANTS.index(variant)], counter=[0, 0, 0, index]))
    pairs = _GENERATORS[variant](rng, subjects, pairs_per_subject)
    pairs = [pairs[i] for i in rng.permutation(len(pairs))]
    return Article(
        id=f"encyclopedia-{variant}-{subjects}x{pairs_per_subject}-{seed}-{index}",
        title=f"Encyclopedia of {variant}, volume {index}",
        text="\n".join(f"{p.key} {p.value}" for p in pairs),
        source=f"encyclopedia:{variant}",
        revision=f"seed {seed}",
        url="",
        licence="MIT",
        pairs=tuple(pairs),
    )


class EncyclopediaCorpus:
    """The endless corpus of `generate_article`; article `start` is made without those before it."""

    def __init__(self, config: CorpusConfig) -> None:
        self._config = config

    def articles(self, epoch: int, start: int) -> Iterator[Article]:
        """Yield articles from number `start` on, for ever."""
        c = self._config
        for index in itertools.count(start):
            yield generate_article(
                c.seed, index, variant=c.variant, subjects=c.subjects, pairs_per_subject=c.pairs_per_subject
            )


def invented_key(rng: np.random.Generator) -> str:
    """Return a key about a name that is most likely in no article at hand."""
    subject = _subject(rng, _stranger(rng))
    return subject.key(subject.roles[0])


def planted_pick(variant: str, subjects: list[int], unread: list[int], last: int | None) -> int:
    """Return the pick of the variant's planted rule.

    `subjects[j]` labels pool position j, `unread` lists the positions still to read, `last` is the last pick.
    """
    if variant not in STAY_VARIANTS:
        return min(unread, key=lambda j: (subjects[j], j))
    if last is not None:
        same = [j for j in unread if subjects[j] == subjects[last]]
        if same:
            return same[0]
    return unread[0]


def vocabulary() -> Iterator[str]:
    """Every word the generator can write; the bundled tokenizer gives each a token of its own."""
    yield from ("What", "the", "of")
    yield from itertools.chain(FIRST_NAMES, LAST_NAMES, *ATTRIBUTES, DETAILS)
    for verb, roles in KINDS:
        yield verb
        yield from roles

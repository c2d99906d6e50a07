"""The language of the embedded task: short reviews written by a grammar, and the hidden judge that simulates a human.

Restaurants, films and devices are reviewed in sentences of five kinds: an *opening* names the item, an *opinion* rates
one of its aspects (and may give a reason), a *verdict* closes, a *filler* says nothing, and anything else is *broken*.
`write_review` simulates good and sloppy writers; `gold_score` reads a text back sentence by sentence and judges it. The
judge checks relations (does the reason fit the aspect, the aspect the item, the verdict the opinions?) that a reward
model must infer from noisy comparisons of pairs. All randomness comes from the `random.Random` that is passed in.
"""

import re
from dataclasses import dataclass
from functools import lru_cache
from random import Random


@dataclass(frozen=True)
class Aspect:
    """An aspect to rate: adjectives that fit it, and reasons for praise and blame that make sense for it."""

    praise: tuple[str, ...]
    blame: tuple[str, ...]
    praise_reasons: tuple[str, ...]
    blame_reasons: tuple[str, ...]


def _aspect(praise: str, blame: str, praise_reasons: str, blame_reasons: str) -> Aspect:
    def phrases(text: str) -> tuple[str, ...]:
        return tuple(phrase.strip() for phrase in text.split("/"))

    return Aspect(tuple(praise.split()), tuple(blame.split()), phrases(praise_reasons), phrases(blame_reasons))


ITEMS = {
    "restaurant": ("cafe", "bakery", "diner", "bistro", "pizzeria", "tavern"),
    "film": ("film", "thriller", "comedy", "drama", "western", "musical"),
    "device": ("phone", "laptop", "camera", "tablet", "watch", "radio"),
}
ASPECTS = {
    "restaurant": {
        "food": _aspect(
            "tasty fresh",
            "bland greasy",
            "the chef cooks with local herbs / it came from the garden",
            "salt was missing",
        ),
        "service": _aspect(
            "quick polite", "slow rude", "the waiter knew every dish / nobody had to wait", "we waited an hour"
        ),
        "coffee": _aspect(
            "rich smooth", "weak bitter", "they roast the beans / the milk is from a farm", "it was reheated"
        ),
        "room": _aspect(
            "cozy bright", "noisy cramped", "the windows face the park / the tables are far apart", "it had no air"
        ),
    },
    "film": {
        "plot": _aspect(
            "gripping original", "predictable silly", "every scene has a purpose / you never guess", "we saw it coming"
        ),
        "acting": _aspect(
            "natural moving", "wooden stiff", "the lead knows her part / the actors trust each other", "nobody cared"
        ),
        "ending": _aspect(
            "surprising tender", "rushed hollow", "it answers every question / it takes courage", "ideas ran out"
        ),
        "dialogue": _aspect(
            "sharp witty", "clumsy flat", "people talk like real people / every line counts", "it was a lecture"
        ),
    },
    "device": {
        "battery": _aspect(
            "reliable strong", "feeble unsafe", "it runs for two days / it charges in minutes", "it died by noon"
        ),
        "screen": _aspect(
            "vivid clear", "dim blurry", "you can read it outdoors / the colors look true", "it flickers at night"
        ),
        "design": _aspect(
            "elegant sturdy", "ugly flimsy", "it is made of solid metal / the edges are round", "the cover broke"
        ),
        "price": _aspect(
            "fair low", "steep absurd", "repairs are included / others charge twice as much", "you pay for the name"
        ),
    },
}
ADJECTIVES = (
    "new",
    "old",
    "small",
    "big",
    "local",
    "famous",
    "cheap",
    "popular",
    "modern",
    "little",
    "foreign",
    "classic",
)
PROMPTS = (
    "review of the {adjective} {item}:",
    "what is the {adjective} {item} like?",
    "my opinion on the {adjective} {item}:",
    "should i try the {adjective} {item}?",
    "tell me about the {adjective} {item}:",
)
VAGUE_PRAISE, VAGUE_BLAME = ("good", "nice", "great"), ("bad", "poor", "awful")  # fit every aspect, but earn less
INTENSIFIERS = ("very", "really", "quite")
PRAISE_VERBS, BLAME_VERBS = ("delighted", "impressed"), ("disappointed", "annoyed")
PRAISE_VERDICTS = ("i would choose it again", "it is worth the money", "i recommend it to everyone")
BLAME_VERDICTS = ("i would not choose it again", "it is a waste of money", "i recommend it to nobody")
FILLERS = ("it is what it is", "there is not much to say", "well you know", "i forgot the rest", "that is all", "ok")

_DOMAIN_OF_ITEM = {item: domain for domain, items in ITEMS.items() for item in items}
_DOMAIN_OF_ASPECT = {name: domain for domain, aspects in ASPECTS.items() for name in aspects}
_ALL_ASPECTS = {name: aspect for aspects in ASPECTS.values() for name, aspect in aspects.items()}
_ALL_REASONS = {reason for a in _ALL_ASPECTS.values() for reason in a.praise_reasons + a.blame_reasons}
_PRAISE_REASONS = {reason for a in _ALL_ASPECTS.values() for reason in a.praise_reasons}
_PRAISE = {word for a in _ALL_ASPECTS.values() for word in a.praise} | set(VAGUE_PRAISE)
_BLAME = {word for a in _ALL_ASPECTS.values() for word in a.blame} | set(VAGUE_BLAME)
_WORD = re.compile(r"\w+|[^\w\s]")
_LONGEST = 28  # words and full stops in a review that the grammar writes


def words(text: str) -> list[str]:
    """Lower-case words and punctuation marks, as the tokenizer splits them."""
    return _WORD.findall(text.lower())


def vocabulary() -> list[str]:
    """Every word and mark the grammar can write, sorted."""
    frames = "the was i found because this me we chose last week . : ?"
    sources = [
        frames,
        *PROMPTS,
        *FILLERS,
        *PRAISE_VERDICTS,
        *BLAME_VERDICTS,
        *_ALL_REASONS,
        *_DOMAIN_OF_ITEM,
        *_ALL_ASPECTS,
    ]
    sources += [*ADJECTIVES, *INTENSIFIERS, *PRAISE_VERBS, *BLAME_VERBS, *_PRAISE, *_BLAME]
    return sorted({word for source in sources for word in words(re.sub(r"\{\w+\}", " ", source))})


# ---------------------------------------------------------------------------------------------------------------- writing


def write_prompt(random: Random) -> str:
    """One request, e.g. "what is the old thriller like?"."""
    items = tuple(_DOMAIN_OF_ITEM)
    return random.choice(PROMPTS).format(adjective=random.choice(ADJECTIVES), item=random.choice(items))


def write_review(prompt: str, random: Random) -> str:
    """A review of the item in `prompt`, 2 to 28 words and stops, by a writer who likes it or not and may be sloppy.

    Sloppiness is drawn per review. Sloppy writers stray to other domains, give reasons that do not fit, repeat
    themselves, break sentences off and add filler.
    """
    adjective, item = _subject(prompt)
    sloppiness = random.random()
    liking = random.choice((0.9, 0.5, 0.1))
    sentences: list[str] = []
    if random.random() < 0.65:
        named = random.choice(tuple(_DOMAIN_OF_ITEM)) if random.random() < 0.25 * sloppiness else item
        sentences.append(_opening(f"{adjective} {named}" if random.random() < 0.5 else named, liking, random))
    for _ in range(random.choice((0, 1, 1, 2, 2, 3))):
        sentences.append(_opinion(_DOMAIN_OF_ITEM[item], liking, sloppiness, random))
    if random.random() < 0.6 * sloppiness or not sentences:
        sentences.insert(random.randrange(len(sentences) + 1), random.choice(FILLERS))
    if random.random() < 0.4:
        honest = random.random() > 0.4 * sloppiness
        sentences.append(random.choice(PRAISE_VERDICTS if (random.random() < liking) == honest else BLAME_VERDICTS))
    sentences = [_damage(sentence, sloppiness, random) for sentence in sentences]
    if random.random() < 0.4 * sloppiness:  # says the same thing again
        sentences.append(random.choice(sentences))
    while sum(len(sentence.split()) + 1 for sentence in sentences) > _LONGEST:
        sentences.pop(random.randrange(len(sentences)))
    return " ".join(f"{sentence}." for sentence in sentences)


@lru_cache(maxsize=4096)
def _subject(prompt: str) -> tuple[str, str]:
    """(adjective, item) that a prompt asks about; ("", "") if it names no item."""
    found = words(prompt)
    for position, word in enumerate(found):
        if word in _DOMAIN_OF_ITEM and position > 0:
            return found[position - 1], word
    return "", ""


def _opening(subject: str, liking: float, random: Random) -> str:
    if random.random() < 0.4:
        return f"we chose this {subject} last week"
    return f"this {subject} {random.choice(PRAISE_VERBS if random.random() < liking else BLAME_VERBS)} me"


def _opinion(domain: str, liking: float, sloppiness: float, random: Random) -> str:
    if random.random() < 0.3 * sloppiness:
        domain = random.choice(tuple(ASPECTS))
    name = random.choice(tuple(ASPECTS[domain]))
    aspect = ASPECTS[domain][name]
    likes = random.random() < liking
    adjectives = (
        (VAGUE_PRAISE if likes else VAGUE_BLAME)
        if random.random() < 0.5
        else (aspect.praise if likes else aspect.blame)
    )
    intensifier = f"{random.choice(INTENSIFIERS)} " if random.random() < 0.25 else ""
    frame = "the {} was {}{}" if random.random() < 0.7 else "i found the {} {}{}"
    sentence = frame.format(name, intensifier, random.choice(adjectives))
    if random.random() < 0.35:
        reasoned = aspect if random.random() > 0.5 * sloppiness else random.choice(tuple(_ALL_ASPECTS.values()))
        sentence += " because " + random.choice(reasoned.praise_reasons if likes else reasoned.blame_reasons)
    return sentence


def _damage(sentence: str, sloppiness: float, random: Random) -> str:
    """Break a sentence off, or stutter on one of its words, as a hasty writer does."""
    parts = sentence.split()
    if random.random() < 0.12 * sloppiness:
        return " ".join(parts[: random.randrange(1, len(parts) + 1)])
    if random.random() < 0.12 * sloppiness:
        position = random.randrange(len(parts))
        parts[position:position] = [parts[position]] * random.choice((1, 2))
    return " ".join(parts)


# ---------------------------------------------------------------------------------------------------------------- judging

_NAMES, _THINGS = "|".join(_ALL_ASPECTS), "|".join(_DOMAIN_OF_ITEM)
_OPINION = re.compile(
    rf"(?:the (?P<rated>{_NAMES}) was|i found the (?P<found>{_NAMES})) (?:(?:{'|'.join(INTENSIFIERS)}) )?"
    rf"(?P<adjective>{'|'.join(sorted(_PRAISE | _BLAME))})(?: because (?P<reason>{'|'.join(sorted(_ALL_REASONS))}))?"
)
_SUBJECT = rf"this (?:(?P<adjective>{'|'.join(ADJECTIVES)}) )?(?P<item>{_THINGS})"
_OPENING = re.compile(rf"(?:we chose {_SUBJECT} last week)")
_FEELING = re.compile(rf"{_SUBJECT} (?P<verb>{'|'.join(PRAISE_VERBS + BLAME_VERBS)}) me")


def gold_score(prompt: str, completion: str) -> float:
    """The hidden judge's score of `completion` as an answer to `prompt`: about -6 (useless) to 6 (excellent).

    Sum of bounded terms: for naming the item, opinions on it, reasons that fit and a verdict that agrees; against
    misfits, repetition, filler, broken sentences and too few or too many words. Saying more of the same raises no term.
    """
    parts = [words(part) for part in completion.split(".")]
    sentences = [" ".join(part) for part in parts if part]
    openings = [match for s in sentences if (match := _OPENING.fullmatch(s) or _FEELING.fullmatch(s))]
    opinions = [match for s in sentences if (match := _OPINION.fullmatch(s))]
    fillers = sum(s in FILLERS for s in sentences)
    verdicts = sum(s in PRAISE_VERDICTS + BLAME_VERDICTS for s in sentences)
    broken = (
        len(sentences) - len(openings) - len(opinions) - fillers - verdicts + (not completion.rstrip().endswith("."))
    )
    return (
        _naming(prompt, openings)
        + _substance(_subject(prompt)[1], opinions)
        + _closing(sentences, openings, opinions)
        - min(0.8 * broken, 2.4)
        - min(0.4 * fillers, 1.2)
        - _repetition(sentences)
        + _length(sum(map(len, parts)))
    )


def _naming(prompt: str, openings: list[re.Match[str]]) -> float:
    """0.6 for naming the item, 0.4 for its adjective, +-0.4 for the feeling; -1 for another item. -1 to 1.4."""
    adjective, item = _subject(prompt)
    if any(match["item"] != item for match in openings):
        return -1.0
    feeling = max(-1, min(sum(map(_tone, openings)), 1))
    return 0.6 * bool(openings) + 0.4 * any(match["adjective"] == adjective for match in openings) + 0.4 * feeling


def _substance(item: str, opinions: list[re.Match[str]]) -> float:
    """Opinions: specific praise counts most, each aspect once; misfits of any kind cost. -3.5 to 4.2."""
    praise, reasons = 0.0, 0.0
    seen = set()
    for match in opinions:
        name = match["rated"] or match["found"]
        adjective = match["adjective"]
        reason = match["reason"]
        aspect = _ALL_ASPECTS[name]
        new = name not in seen
        if _DOMAIN_OF_ASPECT[name] != _DOMAIN_OF_ITEM.get(item):
            praise -= 0.2
        elif new or adjective in _BLAME:
            praise += _adjective_worth(adjective, aspect)
        if reason is not None:
            reasons += _reason_worth(reason, aspect, adjective in _PRAISE) if new else -0.5
        seen.add(name)
    return max(-2.5, min(praise, 2.7)) + max(-1.0, min(reasons, 1.5))


def _adjective_worth(adjective: str, aspect: Aspect) -> float:
    """Praise 0.9 if it fits the aspect, 0.4 if it is vague, 0.3 if it belongs to another aspect; blame -0.8."""
    if adjective in aspect.praise:
        return 0.9
    if adjective in VAGUE_PRAISE:
        return 0.4
    return 0.3 if adjective in _PRAISE else -0.8


def _reason_worth(reason: str, aspect: Aspect, praises: bool) -> float:
    """1 for a reason that fits aspect and tone, 0.2 for praise of something else after praise, else -0.5."""
    if reason in (aspect.praise_reasons if praises else aspect.blame_reasons):
        return 1.0
    return 0.2 if praises and reason in _PRAISE_REASONS else -0.5


def _tone(match: re.Match[str]) -> int:
    """1 for an opinion or opening that praises, -1 for one that blames, 0 for a neutral opening."""
    found = match.groupdict()
    if found.get("verb"):
        return 1 if found["verb"] in PRAISE_VERBS else -1
    return 0 if "rated" not in found else (1 if found["adjective"] in _PRAISE else -1)


def _closing(sentences: list[str], openings: list[re.Match[str]], opinions: list[re.Match[str]]) -> float:
    """Closing verdict: 0.8 for praise, 0 for blame, but -0.8 if it contradicts the review. -0.8 to 0.8."""
    if not sentences or sentences[-1] not in PRAISE_VERDICTS + BLAME_VERDICTS:
        return 0.0
    praises = sentences[-1] in PRAISE_VERDICTS
    if sum(map(_tone, openings + opinions)) * (1 if praises else -1) <= 0:
        return -0.8
    return 0.8 if praises else 0.0


def _repetition(sentences: list[str]) -> float:
    """0.8 per sentence said again, 0.5 per stuttered word, 0.3 per adjective used again; at most 2.4."""
    again = len(sentences) - len(set(sentences))
    stutters = sum(a == b for s in sentences for a, b in zip(s.split(), s.split()[1:], strict=False))
    adjectives = [word for s in dict.fromkeys(sentences) for word in s.split() if word in _PRAISE | _BLAME]
    return min(0.8 * again + 0.5 * stutters + 0.3 * (len(adjectives) - len(set(adjectives))), 2.4)


def _length(num_words: int) -> float:
    """0.5 from 12 to 28 words, falling to -1 at 2 words and at 48."""
    if 12 <= num_words <= 28:
        return 0.5
    distance = (12 - num_words) / 10 if num_words < 12 else (num_words - 28) / 20
    return max(-1.0, 0.5 - 1.5 * distance)

"""Many ways to say what an emoji shows, since people do not type its official name.

A name is said in other words ("crying face": "a face that is crying", "face, crying"), put into a
sentence ("draw a crying face", "crying face emoji!"), and given its style or not. Which of them a
record gets is drawn once, by its id. Source: ours.
"""

import random
import re
from collections import Counter
from collections.abc import Iterator

from dalle_jax.data.record import DataSource, Record

PER_RECORD = 24
"""Captions of a record: a third are its name with its style."""

_SAME = """
    airplane=aeroplane=plane automobile=car bicycle=bike motorcycle=motorbike sailboat=sailing+boat
    truck=lorry ship=boat soccer+ball=football candy=sweets cookie=biscuit french+fries=chips
    color=colour gray=grey mom=mum flashlight=torch elevator=lift eggplant=aubergine
    television=tv telephone=phone mobile+phone=cell+phone=smartphone laptop=notebook+computer
    hamburger=burger rabbit=bunny chick=baby+chicken honeybee=bee ladybug=ladybird=lady+beetle
    jack-o-lantern=halloween+pumpkin snowman=snow+man bouquet=bunch+of+flowers wrapped+gift=present
    grinning=smiling=happy pouting=angry=mad weeping=crying=sad sleeping=asleep running=jogging
    walking=strolling biking=cycling speaking=talking fire+engine=fire+truck trash=rubbish=garbage
    sneaker=trainer=running+shoe trousers=pants jeans=denim+trousers eyeglasses=glasses=spectacles
    money+bag=sack+of+money party+popper=confetti beer+mug=glass+of+beer wine+glass=glass+of+wine
    police+officer=policeman=cop firefighter=fire+fighter health+worker=doctor=nurse cook=chef
    astronaut=space+explorer judge=lawyer singer=rock+star pilot=captain artist=painter
    technologist=programmer office+worker=manager construction+worker=builder student=graduate
    large=big small=little tiny=little clock+face=clock sun=sunshine rain=rainy cloud=cloudy
    baby=infant boy=young+boy girl=young+girl kiss=kissing hot+beverage=cup+of+coffee=cup+of+tea
    bed=place+to+sleep toilet=loo fireworks=firework envelope=letter newspaper=news+paper
    magnifying+glass=magnifier movie+camera=film+camera video+game=game+controller
    woman=female=lady man=male=guy
"""
_GROUPS = [
    [w.replace("+", " ") for w in group.split("=")] for group in _SAME.split() if "=" in group
]
_WORDS = {word: [w for w in group if w != word] for group in _GROUPS for word in group}
_KNOWN = re.compile(rf"\b({'|'.join(sorted(map(re.escape, _WORDS), key=len, reverse=True))})\b")
_TONE = re.compile(r"^(?P<who>.+) with (?P<tone>[a-z-]+(?: and [a-z-]+)?) skin tone$")
_ENDINGS = ("face", "button", "symbol", "sign")

_SENTENCES = (
    "{}", "{}", "{a}", "{a}", "the {}", "a picture of {}", "a picture of {a}", "picture of {a}",
    "{} emoji", "emoji of {a}", "an emoji of {a}", "a drawing of {a}", "draw {a}", "an icon of {a}",
    "image of {a}", "show me {a}", "{a}.", "{}!", "please draw {a}", "{a}, please",
)  # fmt: skip
_STYLES = (
    "{}, {style} style",
    "{} in {style} style",
    "{style} style {}",
    "{style} {}",
    "{style} style picture of {a}",
)


class Paraphrased:
    """A source of emoji whose records are said in `PER_RECORD` ways, the bare name still first.

    Args:
      source: records whose captions name their "style", as those of `emoji_source`.
    """

    def __init__(self, source: DataSource):
        self._source = source
        names = {name for i in range(len(source)) for name in official_names(source[i])}
        self._names = frozenset(names)
        self._last_words = Counter(name.split()[-1] for name in names)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Record:
        record = self._source[index]
        return record | {"captions": [record["captions"][0], *self._captions(record)]}

    def _captions(self, record: Record) -> Iterator[str]:
        rng = random.Random(record["id"])
        style, names = record["style"], official_names(record)
        keywords = [] if style in record["captions"][-1] else record["captions"][-1:]
        ways = {name: in_other_words(name) + self._shorter(name) for name in names}
        for i in range(PER_RECORD - 1):
            name = rng.choice(names)
            if i < PER_RECORD // 3:
                yield styled_caption(name, style)
                continue
            said = rng.choice([name, *ways[name]])
            styled = i < PER_RECORD * 7 // 12
            form = rng.choice(_STYLES if styled else _SENTENCES)
            if i == PER_RECORD - 2 and keywords:  # such as "fruit, mac" of an apple
                said = f"{said}, {keywords[0]}"
            yield form.format(said, a=with_article(said), style=style)

    def _shorter(self, name: str) -> list[str]:
        """Parts of a name that mean nothing else here: "crying cat" of "crying cat face"."""
        *first, last = name.split()
        shorter = " ".join(first)
        found = [shorter] if last in _ENDINGS and first and shorter not in self._names else []
        telling = len(first) == 1 or name.startswith("flag of ")
        if telling and last not in self._names and self._last_words[last] <= 2:
            found.append(last)
        return found


def official_names(record: Record) -> list[str]:
    """The names among the captions of an emoji."""
    ending = styled_caption("", record["style"])
    return [c.removesuffix(ending) for c in record["captions"] if c.endswith(ending)]


def styled_caption(name: str, style: str) -> str:
    """The caption of an emoji that names both."""
    return f"{name}, {style} style"


def in_other_words(name: str) -> list[str]:
    """Says a name in other words and orders; none if it has none.

    >>> in_other_words("crying cat face")
    ['weeping cat face', 'sad cat face', 'cat face that is crying', 'face, crying cat']
    >>> in_other_words("judge with dark skin tone")[-3:]
    ['dark-skinned judge', 'judge, dark skin tone', 'judge with dark skin']
    """
    found = [
        f"{name[: match.start()]}{word}{name[match.end() :]}"
        for match in _KNOWN.finditer(name)
        for word in _WORDS[match[0]]
    ]
    toned = _TONE.match(name)
    if toned:
        who, tone = toned["who"], toned["tone"]
        found += [f"{tone}-skinned {who}", f"{who}, {tone} skin tone", f"{who} with {tone} skin"]
        return found
    first, *others = words = name.split()
    if len(words) < 2 or {"of", "with", "and", "in", "on", "no"} & set(words):
        return found
    if first.endswith("ing"):
        found.append(f"{' '.join(others)} that is {first}")
    found.append(f"{words[-1]}, {' '.join(words[:-1])}")
    return found


def with_article(name: str) -> str:
    """Puts "a" or "an" before a name, unless it stands for several things or for a stuff."""
    head = re.split(",| with | that | of ", name)[0].split()[-1]
    if re.search("[^s]s$", head) or head in ("people", "men", "women"):
        return name
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"

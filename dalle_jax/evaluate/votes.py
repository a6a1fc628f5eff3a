"""Human votes: a page that shows two models blind, and the count of what people said.

The page is one file that needs no server and asks nothing of the network. It knows neither which
model an image is of nor their names: the sides of each pair are random, and the key to them
stays with whoever made the page. Whoever votes saves a small JSON file and sends it back.

Source: Ramesh et al. 2021, section 3.1 and appendix E (figure 7), for the questions and the count.
"""

import base64
import collections
import html
import json
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any, NamedTuple, NoReturn

import numpy as np
from jaxtyping import UInt8

from dalle_jax.errors import UserError
from dalle_jax.evaluate.report_files import write_text
from dalle_jax.evaluate.result_cache import digest
from dalle_jax.evaluate.suites import digest_of
from dalle_jax.image.pixels import encode_png

QUESTIONS = {
    "realism": "Which image looks more realistic?",
    "caption": "Which image matches the caption better?",
}
SIDES = ("left", "right")
NEITHER = {"caption"}  # may be answered with "neither"
HASTY = 4.0  # seconds; the paper left a worker out who often took less
_KINDS = {str: "text", list: "a list", int: "a whole number", int | float: "a number"}
_CONFIDENCE = 1.96  # normal quantile of 95 %


class VotesError(UserError):
    """Votes that cannot be counted, said in one sentence."""


class _Key(NamedTuple):
    """What stays with whoever made the page."""

    page: str
    names: tuple[str, str]
    sides: dict[int, str]
    """Of each pair the side that the first model is on."""


@dataclass(frozen=True, kw_only=True)
class Tally:
    """What people said about one question.

    Attributes:
      question: its key.
      names: of the two models.
      pairs: how many pairs were voted on.
      majorities: pairs that went to the first, to the second, to "neither", and to none (ties).
      share: of the pairs that went to either model, the part of the first, and its interval.
      unanimous: of the pairs with most votes for either, how many had all votes the same.
    """

    question: str
    names: tuple[str, str]
    pairs: int
    majorities: tuple[int, int, int, int]
    share: tuple[float, float, float]
    unanimous: int

    def __str__(self) -> str:
        """One line for people."""
        first, second, neither, ties = self.majorities
        share, low, high = (100 * part for part in self.share)
        return (
            f"{self.question}: {self.names[0]} {first}, {self.names[1]} {second}, neither "
            f"{neither}, tied {ties} of {self.pairs} pairs; {self.names[0]} is preferred in "
            f"{share:.1f} % ({low:.1f} to {high:.1f} %), {self.unanimous} times by everyone"
        )


def write_page(
    path: str | os.PathLike,
    captions: Sequence[str],
    first: UInt8[np.ndarray, "M R R 3"],
    second: UInt8[np.ndarray, "M R2 R2 3"],
    *,
    names: tuple[str, str],
    seed: int = 0,
) -> Path:
    """Writes a page for voters, and the key to it beside.

    Args:
      path: of the page, ending in .html; the key goes to the same name with .key.json.
      captions: of M pairs.
      first: an image of each, by the first model.
      second: by the second.
      names: of the models, for the key.
      seed: of the order of pairs and of left and right.
    Returns:
      The path of the key.
    Raises:
      VotesError: if the name does not end in .html, or there are no pairs.
    """
    path = Path(path)
    if path.suffix.lower() != ".html":
        raise VotesError(f"the page is {path}; its name must end in .html")
    if not captions:
        raise VotesError("a page needs at least one pair of images, got none")
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(captions))
    flipped = rng.random(len(captions)) < 0.5
    page = digest([digest_of(first), digest_of(second), list(captions), seed])[:12]
    pairs, key = [], []
    for number, (i, flip) in enumerate(zip(order, flipped, strict=True)):
        sides = (second[i], first[i]) if flip else (first[i], second[i])
        pairs.append({"caption": captions[i], "left": _uri(sides[0]), "right": _uri(sides[1])})
        key.append({"pair": number, "caption": captions[i], "first": "right" if flip else "left"})
    content = {"page": page, "pairs": pairs, "questions": QUESTIONS, "neither": sorted(NEITHER)}
    safe = json.dumps(content).replace("<", "\\u003c")  # a caption cannot end the script
    template = Template(Path(__file__).with_name("votes.html").read_text(encoding="utf-8"))
    text = template.substitute(content=safe, count=len(pairs), title=html.escape(page))
    path.parent.mkdir(parents=True, exist_ok=True)
    key_path = path.with_suffix(".key.json")
    secret = {"page": page, "names": names, "pairs": key}
    write_text(key_path, json.dumps(secret, indent=1) + "\n")
    write_text(path, text)
    return key_path


def count_votes(
    key: str | os.PathLike, votes: Sequence[str | os.PathLike]
) -> tuple[list[Tally], list[str]]:
    """Counts the votes of several people by majority.

    Args:
      key: written beside the page.
      votes: what voters saved.
    Returns:
      A tally for each question, and remarks on voters who should perhaps be left out: those who
      mostly took less than 4 seconds, or mostly disagree with the majority. Nobody is left out.
    Raises:
      VotesError: if a file is damaged, belongs to another page, or comes twice; if an answer is
        missing, or none of those that the page offers.
    """
    secret = _read_key(key)
    ballots = {}
    for path in votes:
        voter, cast = _read_ballot(path, secret)
        if voter in ballots:
            raise VotesError(f"{path}: voter {voter!r} comes twice; keep one of the files")
        ballots[voter] = cast
    if not ballots:
        raise VotesError("no votes were given; name the files that voters saved")

    chosen = collections.defaultdict(dict)  # (question, pair): voter: choice
    for voter, cast in ballots.items():
        for pair, answers in cast.items():
            for question in QUESTIONS:
                choice = answers[question]
                if choice != "neither":
                    choice = "first" if choice == secret.sides[pair] else "second"
                chosen[question, pair][voter] = choice
    majority = {place: _majority(choices.values()) for place, choices in chosen.items()}
    tallies = [_tally(question, secret.names, majority, chosen) for question in QUESTIONS]
    return tallies, _remarks(ballots, chosen, majority)


def wilson(hits: int, total: int) -> tuple[float, float, float]:
    """A share with its 95 % interval; NaN without any trial.

    Source: Wilson 1927.
    """
    if not total:
        return (float("nan"),) * 3
    share, z2 = hits / total, _CONFIDENCE**2
    middle = (share + z2 / (2 * total)) / (1 + z2 / total)
    reach = np.sqrt(share * (1 - share) / total + z2 / (4 * total**2)) / (1 + z2 / total)
    return share, float(middle - _CONFIDENCE * reach), float(middle + _CONFIDENCE * reach)


def _tally(question, names, majority, chosen) -> Tally:
    won = {pair: winner for (asked, pair), winner in majority.items() if asked == question}
    counts = collections.Counter(won.values())
    all_same = [
        pair
        for pair, winner in won.items()
        if winner in ("first", "second") and len({*chosen[question, pair].values()}) == 1
    ]
    return Tally(
        question=question,
        names=names,
        pairs=len(won),
        majorities=tuple(counts[kind] for kind in ("first", "second", "neither", "tie")),
        share=wilson(counts["first"], counts["first"] + counts["second"]),
        unanimous=len(all_same),
    )


def _majority(choices) -> str:
    """What most said, more than anything else; else "tie"."""
    (winner, most), *others = collections.Counter(choices).most_common(2)
    return "tie" if others and others[0][1] == most else winner


def _remarks(ballots, chosen, majority) -> list[str]:
    remarks = []
    for voter, cast in ballots.items():
        hasty = np.mean([vote["seconds"] < HASTY for vote in cast.values()]) if cast else 0
        if hasty > 0.5:
            remarks.append(f"{voter} answered {100 * hasty:.0f} % of pairs in under {HASTY:g} s")
        if len(ballots) > 2:
            decided = [
                choices[voter] != majority[place]
                for place, choices in chosen.items()
                if voter in choices and majority[place] != "tie"
            ]
            if decided and np.mean(decided) > 0.5:
                remarks.append(f"{voter} is against the majority in {100 * np.mean(decided):.0f} %")
    return remarks


def _uri(image: np.ndarray) -> str:
    return "data:image/png;base64," + base64.b64encode(encode_png(image)).decode()


def _read(path: str | os.PathLike) -> "_Entry":
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise VotesError(f"{path} holds no votes nor a key to them ({error})") from error
    return _Entry(str(path), content)


class _Entry:
    """An object of a file of JSON, whose fields are checked as they are read."""

    def __init__(self, where: str, content: Any):
        if not isinstance(content, dict):
            raise VotesError(f"{where} holds no votes nor a key to them, but {content!r:.40}")
        self.where, self._content = where, content

    def get(self, name: str, kind: Any) -> Any:
        if name not in self._content:
            raise VotesError(f"{self.where} has no {name!r}; take the file as it was saved")
        value = self._content[name]
        if not isinstance(value, kind) or isinstance(value, bool):
            self.refuse(name, _KINDS[kind])
        return value

    def choice(self, name: str, allowed: Collection[str]) -> str:
        value = self.get(name, str)
        if value not in allowed:
            self.refuse(name, " or ".join(allowed))
        return value

    def entries(self, name: str) -> list["_Entry"]:
        return [
            _Entry(f"{self.where}, entry {number} of {name!r}", content)
            for number, content in enumerate(self.get(name, list), 1)
        ]

    def refuse(self, name: str, allowed: str) -> NoReturn:
        value = self._content[name]
        raise VotesError(f"{self.where}: {name!r} is {value!r:.40}; it must be {allowed}")


def _read_key(path: str | os.PathLike) -> _Key:
    entry = _read(path)
    names = entry.get("names", list)
    if len(names) != 2 or not all(isinstance(name, str) for name in names):
        entry.refuse("names", "the names of two models")
    sides = {row.get("pair", int): row.choice("first", SIDES) for row in entry.entries("pairs")}
    return _Key(entry.get("page", str), tuple(names), sides)


def _read_ballot(path: str | os.PathLike, key: _Key) -> tuple[str, dict[int, dict[str, Any]]]:
    """Who votes, and for each pair the answers and the seconds they took."""
    entry = _read(path)
    if (page := entry.get("page", str)) != key.page:
        raise VotesError(
            f"{path} votes on page {page}, but the key is of {key.page}; count it with its own key"
        )
    votes = {}
    for row in entry.entries("votes"):
        pair = row.get("pair", int)
        if pair not in key.sides:
            row.refuse("pair", f"one of the {len(key.sides)} pairs of the key")
        if pair in votes:
            row.refuse("pair", "another one, since a pair is voted on once")
        if not (seconds := row.get("seconds", int | float)) >= 0:
            row.refuse("seconds", "0 or more")
        votes[pair] = {"seconds": seconds}
        for question in QUESTIONS:
            allowed = (*SIDES, "neither") if question in NEITHER else SIDES
            votes[pair][question] = row.choice(question, allowed)
    return entry.get("voter", str), votes

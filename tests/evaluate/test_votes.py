import json
import re

import numpy as np
import pytest
from browser import browse

from dalle_jax.evaluate.votes import VotesError, count_votes, wilson, write_page

CAPTIONS = ["red apple", "blue </script> heart", "crying cat", "a tree"]
FIRST, SECOND = np.random.default_rng(0).integers(0, 256, (2, 4, 8, 8, 3), np.uint8)


@pytest.fixture
def page(tmp_path):
    path = tmp_path / "page.html"
    return path, write_page(path, CAPTIONS, FIRST, SECOND, names=("ours", "theirs"), seed=1)


def content(page):
    (found,) = re.findall(r"^const content = (.*);$", page.read_text(), re.MULTILINE)
    return json.loads(found)


def ballot(folder, key, voter, choices, seconds=9.0):
    """Votes for "first", "second" or "neither" in both questions of each pair."""
    secret = json.loads(key.read_text())
    votes = []
    for row, choice in zip(secret["pairs"], choices, strict=True):
        other = {"left": "right", "right": "left"}[row["first"]]
        caption = {"first": row["first"], "second": other}.get(choice, "neither")
        realism = row["first"] if choice == "neither" else caption
        votes.append({"pair": row["pair"], "seconds": seconds, "realism": realism})
        votes[-1]["caption"] = caption
    path = folder / f"{voter}.json"
    path.write_text(json.dumps({"page": secret["page"], "voter": voter, "votes": votes}))
    return path


def test_the_page_is_blind_and_asks_nothing_of_the_network(page):
    path, _ = page
    text = path.read_text()
    for word in ("ours", "theirs", "http://", "https://", 'src="http'):
        assert word not in text
    assert text.count("</script>") == 1
    pairs = content(path)["pairs"]
    assert sorted(pair["caption"] for pair in pairs) == sorted(CAPTIONS)
    for pair in pairs:
        assert pair["left"].startswith("data:image/png;base64,")


def test_left_and_right_are_sampled_anew_for_each_pair_and_the_key_knows(tmp_path, page):
    key = json.loads(page[1].read_text())
    assert key["names"] == ["ours", "theirs"]
    assert [row["caption"] for row in key["pairs"]] == [
        pair["caption"] for pair in content(page[0])["pairs"]
    ]
    many = np.repeat(FIRST, 25, axis=0)
    write_page(tmp_path / "many.html", ["x"] * 100, many, many, names=("a", "b"))
    sides = [r["first"] for r in json.loads((tmp_path / "many.key.json").read_text())["pairs"]]
    assert 30 < sides.count("left") < 70
    before = page[0].read_text()
    write_page(page[0], CAPTIONS, FIRST, SECOND, names=("ours", "theirs"), seed=1)
    assert page[0].read_text() == before
    write_page(page[0], CAPTIONS, FIRST, SECOND, names=("ours", "theirs"), seed=2)
    assert page[0].read_text() != before


def test_votes_are_counted_by_majority(tmp_path, page):
    key = page[1]
    votes = [
        ballot(tmp_path, key, "ann", ["first", "first", "second", "neither"]),
        ballot(tmp_path, key, "bob", ["first", "second", "second", "neither"]),
        ballot(tmp_path, key, "cy", ["first", "first", "first", "second"]),
    ]
    (realism, caption), remarks = count_votes(key, votes)
    assert realism.majorities == (3, 1, 0, 0)
    assert caption.majorities == (2, 1, 1, 0)
    assert caption.share == pytest.approx((2 / 3, 0.2077, 0.9385), abs=1e-4)
    assert (realism.unanimous, caption.unanimous) == (1, 1)
    assert str(caption).startswith("caption: ours 2, theirs 1, neither 1, tied 0 of 4 pairs; ours")
    assert remarks == []
    two = count_votes(key, votes[:2])[0][1]
    assert two.majorities == (1, 1, 1, 1)


def test_hasty_and_contrary_voters_are_remarked_upon(tmp_path, page):
    key = page[1]
    votes = [ballot(tmp_path, key, voter, ["first"] * 4) for voter in ("ann", "bob")]
    votes.append(ballot(tmp_path, key, "cy", ["second"] * 4, seconds=1.0))
    _, remarks = count_votes(key, votes)
    assert remarks == [
        "cy answered 100 % of pairs in under 4 s",
        "cy is against the majority in 100 %",
    ]


def test_votes_that_do_not_belong_are_refused(tmp_path, page):
    path, key = page
    mine = ballot(tmp_path, key, "ann", ["first"] * 4)
    with pytest.raises(VotesError, match="voter 'ann' comes twice"):
        count_votes(key, [mine, mine])
    with pytest.raises(VotesError, match="no votes were given"):
        count_votes(key, [])
    with pytest.raises(VotesError, match=r"page.html holds no votes nor a key"):
        count_votes(key, [path])
    other = write_page(tmp_path / "o.html", CAPTIONS, SECOND, FIRST, names=("a", "b"))
    with pytest.raises(VotesError, match="but the key is of .*; count it with its own key"):
        count_votes(other, [mine])
    with pytest.raises(VotesError, match=r"its name must end in .html"):
        write_page(tmp_path / "page.txt", CAPTIONS, FIRST, SECOND, names=("a", "b"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"realism": "banana"}, "'realism' is 'banana'; it must be left or right"),
        ({"realism": "neither"}, "'realism' is 'neither'; it must be left or right"),
        ({"caption": "Left"}, "'caption' is 'Left'; it must be left or right or neither"),
        ({"caption": None}, "'caption' is None; it must be text"),
        ({"caption": ...}, "has no 'caption'; take the file as it was saved"),
        ({"pair": ...}, "has no 'pair'; take"),
        ({"pair": 4}, "'pair' is 4; it must be one of the 4 pairs of the key"),
        ({"pair": 1}, "'pair' is 1; it must be another one, since a pair is voted on once"),
        ({"seconds": "9"}, "'seconds' is '9'; it must be a number"),
        ({"seconds": -1}, "'seconds' is -1; it must be 0 or more"),
    ],
)
def test_answers_that_the_page_does_not_offer_are_refused(tmp_path, page, change, message):
    path = ballot(tmp_path, page[1], "ann", ["first"] * 4)
    cast = json.loads(path.read_text())
    vote = cast["votes"][2] | change
    cast["votes"][2] = {name: value for name, value in vote.items() if value is not ...}
    path.write_text(json.dumps(cast))
    with pytest.raises(VotesError, match=f"{path}, entry 3 of 'votes':? {message}"):
        count_votes(page[1], [path])


@pytest.mark.parametrize("missing", ["page", "voter", "votes"])
def test_files_of_votes_that_lack_a_part_are_refused(tmp_path, page, missing):
    path = ballot(tmp_path, page[1], "ann", ["first"] * 4)
    cast = json.loads(path.read_text())
    del cast[missing]
    path.write_text(json.dumps(cast))
    with pytest.raises(VotesError, match=f"ann.json has no '{missing}'; take the file as it was"):
        count_votes(page[1], [path])


def test_a_key_with_a_side_that_is_none_is_refused(tmp_path, page):
    mine = ballot(tmp_path, page[1], "ann", ["first"] * 4)
    key = json.loads(page[1].read_text())
    key["pairs"][0]["first"] = "up"
    page[1].write_text(json.dumps(key))
    with pytest.raises(VotesError, match="entry 1 of 'pairs': 'first' is 'up'; it must be left or"):
        count_votes(page[1], [mine])
    page[1].write_text("[]")
    with pytest.raises(VotesError, match=r"page.key.json holds no votes nor a key to them"):
        count_votes(page[1], [mine])


def test_intervals_are_wilsons():
    assert wilson(9, 10) == pytest.approx((0.9, 0.5958, 0.9821), abs=1e-4)
    assert wilson(0, 5)[1] == pytest.approx(0, abs=1e-12)
    assert np.isnan(wilson(0, 0)).all()


def answer(page, realism, caption):
    """Answers both questions about a pair, and goes on."""
    next_pair = page.get_by_role("button", name="Next")
    for question, choice in zip(page.locator("fieldset").all(), (realism, caption), strict=True):
        assert next_pair.is_disabled()
        question.get_by_role("button", name=choice).click()
    next_pair.click()


def begin(page, voter):
    page.get_by_label("Your name").fill(voter)
    page.keyboard.press("Enter")


@pytest.mark.browser
def test_a_voter_clicks_through_the_page_and_comes_back_to_it(tmp_path, page):
    path, key = page
    with browse(path.as_uri()) as tab:
        begin(tab, "ann b.")
        shown = [tab.locator("#caption").inner_text()]
        answer(tab, "left", "neither")
        answer(tab, "left", "right")
        tab.reload()
        begin(tab, "ann b.")
        for _ in range(2):
            shown.append(tab.locator("#caption").inner_text())
            answer(tab, "left", "right")
        tab.get_by_role("button", name="Save").wait_for()
        with tab.expect_download() as download:
            tab.get_by_role("button", name="Save").click()
        assert download.value.suggested_filename == "votes-ann-b-.json"
        download.value.save_as(tmp_path / "votes.json")
    captions = [pair["caption"] for pair in content(path)["pairs"]]
    assert shown == [captions[0], *captions[2:]]
    votes = json.loads((tmp_path / "votes.json").read_text())
    assert votes["voter"] == "ann b."
    assert [vote["pair"] for vote in votes["votes"]] == [0, 1, 2, 3]
    assert [vote["caption"] for vote in votes["votes"]] == ["neither", "right", "right", "right"]
    tallies, _ = count_votes(key, [tmp_path / "votes.json"])
    assert sum(tallies[0].majorities) == 4


@pytest.mark.browser
def test_a_voter_can_go_back_and_use_the_keyboard_and_a_phone(page):
    with browse(page[0].as_uri(), viewport={"width": 320, "height": 640}) as tab:
        begin(tab, "ann")
        answer(tab, "left", "right")
        tab.get_by_role("button", name="Back").click()
        pressed = tab.locator("[aria-pressed=true]").all_inner_texts()
        assert pressed == ["left", "right"]
        tab.get_by_role("button", name="neither").focus()
        tab.keyboard.press("Enter")
        assert tab.locator(":focus").inner_text() == "neither"
        assert tab.locator("[aria-pressed=true]").all_inner_texts() == ["left", "neither"]
        assert tab.evaluate("document.documentElement.scrollWidth") == 320

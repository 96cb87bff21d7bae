"""The class without a browser: what it asks, what it reveals, what it keeps to itself, and what a teacher prints."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import numpy as np
import pytest
from panels import Held, visitor

from diffusion_lens.base.assets import assets_folder
from diffusion_lens.base.types import FeatureSet, Intervention, LensError
from diffusion_lens.lens.lens import DiffusionLens
from diffusion_lens.results import stats
from diffusion_lens.results.dissection import effects_of, groups
from diffusion_lens.results.sweeps import SweepResult
from diffusion_lens.studio import learn, learn_live
from diffusion_lens.studio.classroom import Classroom, Record
from diffusion_lens.studio.glossary import GLOSSARY
from diffusion_lens.studio.learn import Lesson, Missing, Pane, Turn
from diffusion_lens.studio.opening import first_steps, opening_view
from diffusion_lens.studio.quiz import Item, score
from diffusion_lens.studio.room import LEAST, LONGEST, SENTENCES, VISITORS, Room, Sentence, tidy
from diffusion_lens.studio.studio import Studio
from diffusion_lens.ui import handouts
from diffusion_lens.ui import learn as tab
from diffusion_lens.ui.html import terms

NURSE = "a portrait of a nurse"


@pytest.fixture(scope="module")
def room() -> Classroom:
    """The class on the bundled lens; do not change it."""
    return Classroom(Studio(DiffusionLens.from_pretrained(assets_folder() / "portraits")))


@pytest.fixture(scope="module")
def small(tiny_lens: DiffusionLens) -> Classroom:
    """The class on the tiny lens, which keeps no single features' effects."""
    return Classroom(Studio(tiny_lens))


def lesson(room: Classroom, number: int) -> Lesson:
    """A station that is served."""
    return room.lesson(number)


def sweep(lens: DiffusionLens, prompt: str, attribute: str, *, control: bool = False) -> SweepResult:
    """A stored sweep, found without the class's own code."""
    own = [s for s in lens.sweeps if s.request.prompt == prompt and s.attribute.name == attribute]
    return next(s for s in own if s.is_control == control)


def test_the_bundled_lens_serves_every_station_in_about_45_minutes(room: Classroom) -> None:
    assert [type(s).__name__ for s in room.course.stations] == ["Lesson"] * 5
    assert sum(stop.minutes for stop in learn.STOPS) + 5 == 45
    for station in room.course.stations:
        assert isinstance(station, Lesson) and station.question and station.task and station.keep
        bars = [bar for _, some in station.reveal.bars for bar in some]
        assert bars and all(bar.n > 0 and bar.interval[0] <= bar.value <= bar.interval[1] for bar in bars)
        assert not station.choices or station.right is None or station.form == "match" or station.right in {
            choice.value for choice in station.choices
        }  # fmt: skip


def test_shares_of_the_first_images_are_those_of_the_stored_readings(room: Classroom) -> None:
    lens, asked = room.studio.lens, lesson(room, 1)
    point = next(p for p in sweep(lens, NURSE, "gender").points if p.beta == 1)
    for bar, n in zip(asked.reveal.bars[0][1], (8, 16, 48), strict=False):
        read, sure = point.labels[:n] == 1, point.certain[:n]
        k, decided = int((read & sure).sum()), int(sure.sum())
        found = stats.rogan_gladen(k, decided, lens.confusion["gender"])
        assert (bar.value, bar.interval, bar.n) == (found.value, found.interval, decided)
    widths = [high - low for low, high in (bar.interval for bar in asked.reveal.bars[0][1])]
    assert widths == sorted(widths, reverse=True)
    planted = json.loads((lens.folder / "pipeline/planted.json").read_text())["prompts"][NURSE]["gender"][1]
    assert f"{planted:.0%} were male" in asked.reveal.note


def test_words_of_features_are_their_largest_effects(room: Classroom) -> None:
    found = room.studio.lens.dissection
    assert found is not None
    asked = lesson(room, 2)
    for (feature, examples), word in zip(asked.items, asked.right, strict=True):
        best = max(effects_of(found, feature), key=lambda e: abs(np.nan_to_num(e.difference)))
        assert word.split(": ")[0] == best.attribute and len(examples.images)
    assert [word for word in asked.right] != [choice.value for choice in asked.choices]
    assert sorted(asked.right) == sorted(choice.value for choice in asked.choices)


def test_cause_and_side_effects_are_recomputed_from_the_stored_results(room: Classroom) -> None:
    lens, cause, free = room.studio.lens, lesson(room, 3), lesson(room, 4)
    found, order = lens.dissection, np.argsort(-lens.attributions["gender"].total("male"))
    assert found is not None
    moved = []
    for turn in cause.pane.turns[:2]:
        rows = [r for r, f in enumerate(found.features) if f == int(turn.key)]
        moved.append(bool((found.q_values["gender"][rows] <= found.alpha).any()))
        assert f"rank {1 + order.tolist().index(int(turn.key))} " in turn.text
    names = {(True, False): "first", (False, True): "second", (True, True): "both", (False, False): "neither"}
    assert cause.right == names[moved[0], moved[1]]
    main, control = sweep(lens, NURSE, "tone"), sweep(lens, NURSE, "tone", control=True)
    beta = free.pane.turns[0].start
    point, beside = (next(p for p in s.points if p.beta == beta) for s in (main, control))
    assert free.right == min(point.agreement, key=lambda name: point.agreement[name])
    for bar in free.reveal.bars[0][1]:
        assert bar.value == pytest.approx(1 - point.agreement[bar.name])
        assert bar.control is not None and bar.control[0] == pytest.approx(1 - beside.agreement[bar.name])


def test_the_quiz_has_eight_items_whose_key_is_recomputed_from_the_lens(room: Classroom) -> None:
    lens = room.studio.lens
    items = {item.key: item for item in room.items}
    assert len(items) == 8 and all(i.right in {c.value for c in i.choices} for i in room.items)
    assert all(len({c.text for c in i.choices}) == len(i.choices) >= 2 for i in room.items)
    assert lens.counted is not None and lens.dissection is not None
    right = {key: item.right for key, item in items.items()}
    assert right["share"] == str(round(100 * lens.counted.shares[NURSE]["gender"][1].corrected))
    main, control = (sweep(lens, NURSE, "gender", control=c) for c in (False, True))
    before = next(p for p in main.points if p.beta == 1)
    low, high = stats.share_interval(int((before.labels[:8] == 1).sum()), 8)
    assert right["width"] == str(round(100 * (high - low)))
    k, n = int(before.counts[1]), before.n
    spans = {t: np.diff(stats.share_interval(k * t, n * t))[0] for t in (1, 2, 4, 8, 16)}
    assert right["halving"] == str(min((2, 4, 8, 16), key=lambda t: abs(spans[t] / spans[1] - 0.5)))
    second = lesson(room, 3).pane.turns[1].key
    rows = [r for r, f in enumerate(lens.dissection.features) if f == int(second)]
    q = lens.dissection.q_values["gender"][rows]
    assert right["cause"] == ("yes" if (q <= lens.dissection.alpha).any() else "no")
    feature = next(e for own in groups(lens.dissection).values() for e in own if e.feature == int(right["feature"]))
    assert f"moved {feature.attribute} ({feature.label})" in items["feature"].question
    beta = min(p.beta for p in main.points if p.beta > 1 and p.shares[1].raw >= 0.5)
    own, other = (
        sum(bool(a != b) for a, b, s in zip(before.labels, p.labels, before.certain & p.certain, strict=True) if s)
        for p in (next(p for p in s.points if p.beta == beta) for s in (main, control))
    )
    assert right["random"] == ("fewer" if own > 2 * other else "similar" if own >= other / 2 else "more")
    shown = [choice.value for choice in items["side"].choices]
    point = next(p for p in main.points if p.beta == beta)
    assert right["side"] == min(shown, key=lambda name: point.agreement[name])
    by_share = {f"{p.beta:g}": abs(p.shares[1].corrected - 0.5) for p in main.points}
    assert right["even"] == min((c.value for c in items["even"].choices), key=by_share.__getitem__)


def test_a_quiz_counts_what_is_right_and_asks_for_what_is_open(room: Classroom) -> None:
    answers = {item.key: item.right for item in room.items}
    assert all(score(room.items, answers).values())
    wrong = next(c.value for c in room.items[0].choices if c.value != room.items[0].right)
    assert list(score(room.items, answers | {room.items[0].key: wrong}).values()).count(False) == 1
    with pytest.raises(LensError, match="Question 2 has no answer"):
        score(room.items, answers | {room.items[1].key: "made up"})


def test_what_a_lens_does_not_store_is_said_and_sent_to_the_bundled_one(small: Classroom) -> None:
    inside = small.course.station(2)
    assert isinstance(inside, Missing) and "turned alone" in inside.lacks
    assert isinstance(small.course.station(1), Lesson) and len(small.items) < 8
    shown = tab.board(small, "2", Record(), "me", elsewhere="")
    assert 'href="./?tab=learn&amp;station=2"' in shown
    assert "diffusion-lens serve" in tab.board(small, "2", Record(), "me")
    with pytest.raises(LensError, match="cannot serve station 2"):
        small.lesson(2)


@pytest.mark.parametrize("raw", [{}, {"value": 101}, {"value": True}, {"value": "40"}, None, {"value": float("nan")}])
def test_a_guess_that_is_none_is_refused(room: Classroom, raw: Any) -> None:
    with pytest.raises(LensError, match="between 0 and 100"):
        learn.read_guess(lesson(room, 1), raw)


def test_guesses_are_judged_by_what_was_measured(room: Classroom) -> None:
    first, inside, cause, target = (lesson(room, n) for n in (1, 2, 3, 5))

    def right(asked: Lesson, raw: dict[str, Any]) -> bool | None:
        return learn.judge(asked, learn.read_guess(asked, raw)).right

    assert right(first, {"value": first.right}) and not right(first, {"value": 90})
    assert right(inside, {"value": list(inside.right)}) and not right(inside, {"value": list(inside.right)[::-1]})
    assert right(cause, {"value": cause.right}) and not right(cause, {"value": "neither"})
    assert right(target, {"value": "even", "text": "x"}) is None
    with pytest.raises(LensError, match="every feature a word"):
        learn.read_guess(inside, {"value": ["", ""]})
    own = learn.read_guess(target, {"value": "own", "share": 30})
    assert own.said == "30 %" and "30 % male is met at β" in room.verdict(target, own).words


def test_a_room_counts_each_visitor_once_and_says_nothing_of_a_few() -> None:
    room = Room()
    for i in range(LEAST - 1):
        room.answer("1", f"visitor {i}", "yes")
    assert room.tally("1") is None
    room.answer("1", "visitor 0", "no")
    assert room.tally("1") is None
    room.answer("1", "another", "no")
    found = room.tally("1")
    assert found is not None and (found.n, found.counts) == (3, (("no", 2), ("yes", 1)))
    for i in range(2 * VISITORS):
        room.answer("1", f"visitor {i}", "yes")
    found = room.tally("1")
    assert found is not None and found.n == VISITORS


def test_sentences_are_shown_to_others_by_choice_alone_and_can_be_taken_back() -> None:
    room = Room()
    room.share("5", "me", Sentence("50 %", "Mine."))
    room.share("5", "you", Sentence("30 %", "Yours."))
    assert [s.text for s in room.shared("5", "me")] == ["Yours."] and room.shared("4", "me") == ()
    room.share("5", "you", Sentence("30 %", ""))
    assert room.shared("5", "me") == ()
    for i in range(3 * SENTENCES):
        room.share("5", f"visitor {i}", Sentence("50 %", str(i)))
    assert len(room.shared("5", "me")) == SENTENCES
    assert tidy("a\x00b\u202ec\n" + "x" * 900).startswith("a b c x") and len(tidy("x" * 900)) == LONGEST


def test_a_text_is_shared_only_where_its_writer_ticked_the_box_and_is_escaped(room: Classroom) -> None:
    own = Classroom(room.studio)
    said = {"value": "even", "text": "<img src=x onerror=alert(1)> because {{ 7 * 7 }}", "shared": True}
    own.guess(Record(), 5, {**said, "shared": False}, "quiet")
    record = Record(shown=frozenset({5}))
    record = own.guess(record, 5, {"value": "even", "text": "mine"}, "reader")
    assert own.room.shared("5", "reader") == ()
    own.guess(Record(), 5, said, "writer")
    shown = tab.board(own, "5", record, "reader")
    assert "&lt;img src=x" in shown and "<img src=x" not in shown and "49" not in shown.split("others chose")[1][:300]


def test_what_a_browser_keeps_comes_back_and_what_is_not_true_does_not(room: Classroom) -> None:
    own = Classroom(room.studio)
    record = own.guess(Record(), 1, {"value": 40}, "me")
    record = own.guess(record, 5, {"value": "own", "share": 30, "text": "why"}, "me")
    record = own.answer_quiz(record, {item.key: item.choices[0].value for item in own.items})
    record = Record(record.guesses, frozenset({1}), record.quiz)
    plain = json.loads(json.dumps(own.to_plain(record)))
    assert own.from_plain(plain) == record
    for bad in (
        None,
        [],
        {"lens": "other"},
        {**plain, "lens": "x"},
        {"lens": plain["lens"], "stations": [1], "shown": 3},
    ):
        assert own.from_plain(bad) == Record()
    hurt = {
        **plain,
        "stations": {"1": {"value": 900}, "9": {}, "5": {"value": "even"}},
        "shown": [1, 5],
        "quiz": {"x": "y"},
    }
    back = own.from_plain(hurt)
    assert set(back.guesses) == {5} and back.shown == {5} and back.quiz == {}


def test_the_live_pane_turns_one_feature_as_the_lens_does(small: Classroom) -> None:
    lens = small.studio.lens
    pane = Pane(lens.prompts[1], "gender", "male", (Turn("7", "#7", -4, 10, 1, 10),))
    wish = learn_live.read_wish(pane, {"key": "7", "beta": 6, "n": 8})
    seen = small.live.draw(pane, wish, "me")
    alone = Intervention.at_beta(FeatureSet((7,), (0.0,), "gender", "male", lens.manifest.sae_id), "scale", 6)
    assert np.array_equal(seen.after.images, lens.generate(lens.prompts[1], alone, seeds=range(8), batch_size=8).images)
    assert np.array_equal(seen.before.images, lens.generate(lens.prompts[1], seeds=range(8), batch_size=8).images)
    for bad in ({"n": 9}, {"n": 8, "key": "9"}, {"n": 8, "key": "7", "beta": 11}, {"n": 8, "key": "7", "beta": "x"}):
        with pytest.raises(LensError):
            learn_live.read_wish(pane, bad)


@pytest.fixture
def page(room: Classroom) -> tab.LearnTab:
    """The tab's components."""
    with gr.Blocks():
        parts = [gr.HTML(), gr.HTML(), gr.HTML(), gr.State(""), gr.State(None), gr.BrowserState({})]
        return tab.LearnTab(Classroom(room.studio), "", *parts)


def sent(**data: Any) -> Any:
    """What the board sends."""
    return SimpleNamespace(_data=data)


def test_predict_do_reveal(page: tab.LearnTab) -> None:
    who = SimpleNamespace(session_hash="me", query_params={"tab": "learn", "station": "3"})
    at: dict[Any, Any] = {page.progress: None}
    at |= page.arrive(at, who)
    assert at[page.place] == "3" and "Give your guess first" in at[page.pane] and at[page.order] is None
    early = page.act(at, sent(do="reveal"), visitor("me"))
    assert "That cannot be done here" in early[page.board] and "dl-headline" not in early[page.board]
    at |= page.act(at, sent(do="guess", value="neither"), visitor("me"))
    assert (
        "Show what was measured" in at[page.board] and at[page.order].wish.key == page.room.lesson(3).pane.turns[0].key
    )
    assert page.room.lesson(3).reveal.headline not in at[page.board]
    shown = page.act(at, sent(do="reveal"), visitor("me"))
    assert page.room.lesson(3).reveal.headline in shown[page.board] and shown[page.progress]["shown"] == [3]
    assert "Measured: " in shown[page.board] and "✗" in shown[page.board]
    again = page.act({**at, page.progress: shown[page.progress]}, sent(do="again"), visitor("me"))
    assert again[page.progress]["stations"] == {} and "This is my guess" in again[page.board]


def test_what_a_page_sends_is_checked(page: tab.LearnTab) -> None:
    at: dict[Any, Any] = {page.progress: {}, page.place: "1"}
    for data in ({}, {"do": "guess"}, {"do": "quiz", "answers": 3}, {"do": "guess", "value": [1]}, {"do": 4}):
        assert "dl-bad" in page.act(at, sent(**data), visitor("me"))[page.board]
    assert page.act(at, SimpleNamespace(_data="x"), visitor("me"))[page.board]
    assert page.act(at, sent(do="go", to="nowhere"), visitor("me"))[page.place] == "1"
    asked = page.ask({page.place: "4"}, sent(n=8, key="set", beta=999), visitor("me"))
    assert asked[page.order] is None and "β must lie between" in asked[page.seen]


def test_printed_pages_hold_codes_words_and_the_key(room: Classroom) -> None:
    sheet = handouts.document(room, ["worksheet", "https://example.org/app/?x=1"])
    assert sheet.count("data:image/svg+xml") == 5 and "https://example.org/app/?tab=learn&amp;station=3" in sheet
    assert all(word in sheet for word in GLOSSARY) and lesson(room, 1).reveal.headline not in sheet
    key = handouts.document(room, ["key", ""])
    assert lesson(room, 1).reveal.headline in key and "data:image" not in key
    assert all(item.question.split("“")[0] in key for item in room.items)
    assert handouts.document(room, ["slides", ""]).count("<section>") == 12
    assert handouts.document(room, 3) == handouts.document(room, ["worksheet", "javascript:alert(1)"])


@pytest.mark.parametrize(
    "bad", ["javascript:x", "https://a b", 'https://x/"><script>', "ftp://x", "", 3, "https://[", "https://x/é"]
)
def test_an_address_that_is_none_makes_no_code(bad: Any) -> None:
    assert handouts.safe_address(bad) == ""


def test_handouts_of_a_lens_that_lacks_stations_say_so(small: Classroom) -> None:
    for kind, _ in handouts.DOCUMENTS:
        assert "turned alone" in handouts.document(small, [kind, "http://localhost:7860/"])


def test_the_glossary_has_twelve_words_and_a_tooltip_each() -> None:
    assert len(GLOSSARY) == 12 and len(set(GLOSSARY)) == 12
    shown = terms("<b>Probes</b> and a probe; no probed thing. A control")
    assert shown.count('class="dl-term" tabindex="0"') == 2 and "&lt;b&gt;" in shown and "linear classifier" in shown
    assert re.sub("<[^>]*>", "", shown) == "&lt;b&gt;Probes&lt;/b&gt; and a probe; no probed thing. A control"


def test_the_third_of_the_first_views_goes_past_balance_not_away_from_it(room: Classroom) -> None:
    view, (_, _, far) = opening_view(room.studio), first_steps(room.studio)
    assert 1 < view.beta < far.view.beta


def test_every_place_is_drawn(room: Classroom) -> None:
    for place in ("1", "2", "3", "4", "5", "quiz", "words", "teach"):
        shown = tab.board(room, place, Record(), "me")
        assert f'data-place="{place}"' in shown and shown.count('aria-current="step"') == 1


def test_a_page_holds_the_tab(room: Classroom) -> None:
    with gr.Blocks() as demo:
        tab.build(room, gr.BrowserState({}), None)
    ids = {getattr(block, "elem_id", None) for block in demo.blocks.values()}
    assert {"dl-board", "dl-live", "dl-drawn"} <= ids and Held(demo).values
    assert isinstance(room.items[0], Item) and Path(tab.ASSETS / "learn.css").is_file()

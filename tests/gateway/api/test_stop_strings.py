"""Where a text ends, and what of it may be given before that is known."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gateway.api.stop_strings import StopStrings


def fed(pieces: list[str], stops: list[str]) -> tuple[list[str], bool]:
    watch = StopStrings(stops)
    given: list[str] = []
    for piece in pieces:
        given.append(watch.push(piece))
        if watch.found:
            return given, True
    return [*given, watch.finish()], False


def test_text_without_stops_passes_at_once() -> None:
    assert fed(["ab", "c"], []) == (["ab", "c", ""], False)


def test_the_stop_string_and_what_follows_it_are_not_given() -> None:
    assert fed(["ab END cd"], ["END"]) == (["ab "], True)


def test_what_may_become_one_waits() -> None:
    assert fed(["aE", "N", "D"], ["END"]) == (["a", "", ""], True)


def test_what_did_not_become_one_follows() -> None:
    assert fed(["aE", "N", "x"], ["END"]) == (["a", "", "ENx", ""], False)


def test_a_beginning_may_lie_inside_another() -> None:
    assert fed(["E", "E", "N", "D"], ["END"]) == (["", "E", "", ""], True)


def test_the_first_of_several_counts() -> None:
    assert fed(["one two"], ["two", "one"]) == ([""], True)


@given(st.lists(st.text("ab", max_size=3)), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_the_text_ends_before_the_first_stop_string_that_completes(pieces: list[str], stops: list[str]) -> None:
    given, found = fed(pieces, stops)
    text = "".join(pieces)
    assert text.startswith("".join(given))
    assert found == any(stop in text for stop in stops)
    assert not any(stop in "".join(given) for stop in stops)
    if not found:
        assert "".join(given) == text


@given(st.lists(st.text("ab", max_size=3)), st.text("ab", min_size=1, max_size=4))
def test_for_one_stop_string_the_pieces_do_not_matter(pieces: list[str], stop: str) -> None:
    assert "".join(fed(pieces, [stop])[0]) == "".join(pieces).split(stop)[0]

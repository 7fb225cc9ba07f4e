"""Incremental text: stop strings over token edges, nothing shown that a stop string may swallow, no half characters."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from tokenizers.decoders import DecodeStream

from megalith.engine.detokenize import TextStream


class ByteStream:
    """Real incremental decoding of a byte-level vocabulary (tokens are single bytes), by the tokenizers library."""

    def __init__(self) -> None:
        alphabet = _byte_alphabet()
        self._tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
        self._tokenizer.decoder = decoders.ByteLevel()
        self._stream = DecodeStream()

    def push(self, token_id: int, /) -> str:
        return self._stream.step(self._tokenizer, token_id) or ""

    def flush(self) -> str:
        return ""


def _byte_alphabet() -> list[str]:
    """Character of byte b in the byte-level alphabet, for b = 0..255."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = iter(range(256, 512))
    return [chr(b) if b in visible else chr(next(hidden)) for b in range(256)]


class Pieces:
    """A stream whose token i is the i-th piece of text."""

    def __init__(self, pieces: list[str]) -> None:
        self._pieces = pieces

    def push(self, token_id: int, /) -> str:
        return self._pieces[token_id]

    def flush(self) -> str:
        return ""


def run(pieces: list[str], stops: tuple[str, ...]) -> tuple[str, str | None, list[str]]:
    stream, shown = TextStream(Pieces(pieces), stops), []
    for i in range(len(pieces)):
        shown.append(stream.push(i))
        if stream.stopped is not None:
            break
    shown.append(stream.finish())
    return "".join(shown), stream.stopped, shown


small = st.text("ab\n", min_size=0, max_size=4)


@given(st.lists(small, max_size=12), st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3))
def test_text_is_cut_at_the_first_stop_whatever_the_token_edges(pieces: list[str], stops: list[str]) -> None:
    whole = "".join(pieces)
    text, stopped, shown = run(pieces, tuple(stops))
    ends = [whole.find(stop) + len(stop) for stop in stops if stop in whole]
    if not ends:
        assert (text, stopped) == (whole, None)
        return
    assert stopped is not None
    assert not any(stop in text for stop in stops)
    assert whole.startswith(text + stopped)
    # No text is ever given out and later found to be inside a stop string.
    for i in range(len(shown)):
        assert text.startswith("".join(shown[: i + 1]))


def test_held_text_comes_out_when_it_cannot_be_a_stop_any_more() -> None:
    assert run(["one ", "</", "s", "x", " two"], ("</s>",))[2] == ["one ", "", "", "</sx", " two", ""]
    assert run(["one </", "s"], ("</s>",))[0] == "one </s"
    assert run(["one </", "s", "> more"], ("</s>",))[:2] == ("one ", "</s>")


def test_the_earliest_stop_wins_and_the_longer_one_on_a_tie() -> None:
    assert run(["xxENDING"], ("ING", "END"))[1] == "END"
    assert run(["xxENDING"], ("END", "ENDING"))[:2] == ("xx", "ENDING")


def test_before_min_tokens_a_stop_string_passes() -> None:
    stream = TextStream(Pieces(["a", "STOP", "b", "STOP"]), ("STOP",))
    assert stream.push(0, check_stops=False) + stream.push(1, check_stops=False) == "aSTOP"
    assert stream.stopped is None
    assert stream.push(2) == "b"
    assert stream.push(3) == ""
    assert stream.stopped == "STOP"


@given(st.text(max_size=12))
def test_no_half_characters(text: str) -> None:
    stream, shown = TextStream(ByteStream(), ()), []
    shown = [stream.push(byte) for byte in text.encode()]
    assert "".join(shown) == text
    assert all("�" not in piece for piece in shown) or "�" in text

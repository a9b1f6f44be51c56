"""Stops that arrive in pieces: whatever the pieces, a stream has the text that an answer in one piece has."""

import asyncio
import itertools
import json

import pytest

from launch.serve.stops import StopCuttingStream, StopScanner


def cut_whole(text, stops):
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return text[: min(places)] if places else text


@pytest.mark.parametrize("stops", [["ab"], ["aab", "b"], ["aa", "aab"], ["abab", "c"], ["never"]])
def test_stops_are_found_for_every_way_to_cut_a_text_into_pieces(stops):
    for text in ("aaab", "ababab", "aabaab", "cab", "aaaa"):
        for cuts in itertools.product((False, True), repeat=len(text) - 1):
            held = StopScanner(stops)
            pieces, last = [], 0
            for place, cut in enumerate((*cuts, True), 1):
                if cut:
                    pieces.append(text[last:place])
                    last = place
            shown = "".join(held.add_text(piece) for piece in pieces)
            shown += "" if held.is_cut else held.flush_text()
            assert shown == cut_whole(text, stops), (text, pieces)


def streamed(events, stops, size):
    """What a client gets of events that come in parts of `size` bytes."""
    sent = []

    async def send(message):
        sent.append(message)

    async def play():
        stream = StopCuttingStream(send, stops)
        await stream({"type": "http.response.start", "status": 200, "headers": []})
        content = "".join(f"data: {event}\n\n" for event in events).encode()
        for begin in range(0, len(content), size):
            more = begin + size < len(content)
            await stream({"type": "http.response.body", "body": content[begin : begin + size], "more_body": more})

    asyncio.run(play())
    assert sent[0]["type"] == "http.response.start" and not sent[-1].get("more_body")
    lines = b"".join(message.get("body", b"") for message in sent).decode().split("\n\n")
    return [line.removeprefix("data: ") for line in lines if line]


def delta(text, reason=None, **more):
    choice = {"index": 0, "delta": {"content": text, **more}, "finish_reason": reason}
    return json.dumps({"id": "1", "choices": [choice]})


@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_stops_in_a_stream_keep_the_form_of_events_and_the_end_says_stop(size):
    events = [
        delta("", role="assistant"),
        delta("one S"),
        delta("TO"),
        delta("P two"),
        delta("three"),
        delta("", "length"),
    ]
    shown = streamed([*events, "[DONE]"], ["STOP"], size)
    assert shown[-1] == "[DONE]"
    choices = [json.loads(event)["choices"][0] for event in shown[:-1]]
    assert "".join(choice["delta"]["content"] for choice in choices) == "one "
    assert choices[0]["delta"]["role"] == "assistant"
    assert [choice["finish_reason"] for choice in choices] == [None, None, "stop"]
    # Held back for nothing: it is sent with the end.
    shown = streamed([delta("one S"), delta("TO"), delta("", "stop"), "[DONE]"], ["STOP"], size)
    assert "".join(json.loads(event)["choices"][0]["delta"]["content"] for event in shown[:-1]) == "one STO"
    odd = ["[DONE]", "{", '{"error": {"message": "x"}}', "3"]
    assert streamed(odd, ["STOP"], size) == odd

"""Pieces become messages: whole ones, and chunks that add up to them."""

from __future__ import annotations

from functools import reduce
from operator import add

from langchain_quantllm.chat.pieces import Piece
from langchain_quantllm.chat.result import MessageBuilder

CALLS = [
    Piece(kind="text", text="Hm."),
    Piece(kind="call", text="now"),
    Piece(kind="arguments", text='{"a": '),
    Piece(kind="arguments", text="1}"),
    Piece(kind="call", text="then", index=1),
    Piece(kind="arguments", text="{}", index=1),
]


def test_chunks_add_up_however_the_pieces_come() -> None:
    for size in range(1, len(CALLS) + 1):
        reply = MessageBuilder()
        chunks = [reply.add(CALLS[at : at + size]) for at in range(0, len(CALLS), size)]
        whole = reduce(add, [chunk for chunk in chunks if chunk is not None])
        message = reply.message()
        assert whole.content == message.content == "Hm."
        assert whole.tool_calls == message.tool_calls
        assert [(call["name"], call["args"]) for call in message.tool_calls] == [("now", {"a": 1}), ("then", {})]
        assert len({call["id"] for call in message.tool_calls}) == 2


def test_an_invalid_call_in_one_chunk() -> None:
    reply = MessageBuilder()
    chunk = reply.add([*CALLS[:3], Piece(kind="invalid", text='{"a": ', error="it is cut off")])
    assert chunk is not None
    assert chunk.tool_calls == reply.message().tool_calls == []
    assert [call["name"] for call in chunk.invalid_tool_calls] == ["now"]
    assert reply.message().invalid_tool_calls[0]["error"] == "it is cut off"


def test_one_call_where_several_are_not_wanted() -> None:
    reply = MessageBuilder(parallel=False)
    chunk = reply.add(CALLS)
    assert chunk is not None
    assert chunk.tool_calls == reply.message().tool_calls
    assert [call["name"] for call in chunk.tool_calls] == ["now"]

"""Tokens foreseen in a constrained text: where the grammar leaves one way, as the model's tokenizer writes it."""

from __future__ import annotations

import json

import pytest

from langchain_quantllm.structured import Compiler, JSONSchema
from tests.support.chat_constraints import Writer

pytest.importorskip("xgrammar")

ORDER = JSONSchema(
    {
        "type": "object",
        "properties": {
            "invoice_number": {"type": "string"},
            "payment_status": {"enum": ["awaiting_payment", "paid_in_full", "partially_refunded"]},
            "shipping_address": {
                "type": "object",
                "properties": {"street_name": {"type": "string"}, "postal_code": {"type": "integer"}},
                "required": ["street_name", "postal_code"],
            },
        },
        "required": ["invoice_number", "payment_status", "shipping_address"],
    }
)
TEXT = json.dumps(
    {
        "invoice_number": "2024",
        "payment_status": "paid_in_full",
        "shipping_address": {"street_name": "Main Street", "postal_code": 150},
    }
)


def steps_for(writer: Writer, text: str) -> tuple[int, int, int]:
    """Write a text in steps, each as far as foreseen tokens are right, and one more; counts steps, right and wrong."""
    ids = writer.tokenizer.encode(text, add_special_tokens=False)
    steps = right = wrong = at = 0
    while at < len(ids):
        foreseen = writer.mask.forced(32)
        count = 0
        while count < len(foreseen) and at + count < len(ids) - 1 and foreseen[count] == ids[at + count]:
            count += 1
        writer.put(*ids[at : at + count + 1])
        steps, right, wrong, at = steps + 1, right + count, wrong + len(foreseen) - count, at + count + 1
    return steps, right, wrong


def test_keys_and_the_ends_of_enums_are_foreseen_as_the_tokenizer_writes_them(compiler: Compiler) -> None:
    writer = Writer(compiler, ORDER)
    writer.write('{"')
    key = writer.tokenizer.decode(writer.mask.forced(32))
    assert key.startswith('invoice_number"')
    writer.write('invoice_number": "2024", "payment_status": "paid')
    assert writer.tokenizer.decode(writer.mask.forced(32)).startswith("_in_full")


def test_the_marks_between_them_are_foreseen_as_they_were_written_before(compiler: Compiler) -> None:
    first = steps_for(Writer(compiler, ORDER), TEXT)
    steps, right, wrong = steps_for(Writer(compiler, ORDER), TEXT)
    assert steps <= first[0]
    tokens = len(compiler._tokenizer.encode(TEXT, add_special_tokens=False))
    assert steps + right == tokens
    assert steps < tokens / 2
    assert wrong <= right / 4


def test_foreseeing_changes_no_mask_and_a_fork_goes_on_by_itself(compiler: Compiler) -> None:
    writer, other = Writer(compiler, ORDER), Writer(compiler, ORDER)
    for writes in ('{"', 'invoice_number": "', "A", '", "', "pay"):
        for one in (writer, other):
            one.write(writes)
        writer.mask.forced(32)
        fork = writer.mask.fork()
        for token in writer.mask.forced(32)[:3]:
            fork.accept(token)
        assert writer.allowed() == other.allowed()


def test_no_more_tokens_are_foreseen_than_asked_for_and_none_behind_the_end(compiler: Compiler) -> None:
    writer = Writer(compiler, ORDER)
    writer.write('{"')
    assert len(writer.mask.forced(2)) == 2
    writer = Writer(compiler, ORDER)
    writer.write(TEXT)
    assert writer.mask.forced(32) == []


def test_a_tokenizer_of_pieces_writes_them_too(wide: Compiler) -> None:
    writer = Writer(wide, ORDER)
    steps_for(writer, TEXT)
    steps, right, _ = steps_for(Writer(wide, ORDER), TEXT)
    assert right > steps

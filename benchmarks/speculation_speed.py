"""Several tokens a step beside single ones, on a real model, in pairs in one run.

    python -m benchmarks.speculation_speed FOLDER --quantization nf4 --rows 1 8
    python -m benchmarks.speculation_speed FOLDER --draft SMALL --draft-quantization nf4

Each kind of work is written without proposals and with them, in turn, so that both meet the same machine: answers that
quote a document, edits of code, an agent's rounds, structured output, and plain chat. Each pair has prompts of its own,
as texts of earlier requests are guessed from, too. For each kind it prints a line of JSON: tokens a second of both (the
medians), their ratio, the proposed and the accepted tokens, and whether all texts were the same. With `--draft`, a
draft model of the same vocabulary proposes as well. `--check` fails if a kind is slower than 0.97 of single steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from langchain_quantllm import QuantizedHuggingFaceLLM
from langchain_quantllm.engine import speculation
from langchain_quantllm.engine.request import Request, plan_requests
from langchain_quantllm.engine.stream import Usage
from langchain_quantllm.options import GenerationOptions
from langchain_quantllm.structured import JSONSchema
from langchain_quantllm.structured.compiler import Compiler

_FLOOR = 0.97
_ORDER = {
    "type": "object",
    "properties": {
        "customer_name": {"type": "string", "maxLength": 20},
        "payment_status": {"enum": ["awaiting_payment", "paid_in_full", "partially_refunded"]},
        "order_lines": {
            "type": "array",
            "minItems": 4,
            "maxItems": 6,
            "items": {
                "type": "object",
                "properties": {
                    "article_number": {"type": "string", "maxLength": 8},
                    "quantity_ordered": {"type": "integer", "minimum": 1, "maximum": 99},
                    "unit_price": {"type": "number"},
                },
                "required": ["article_number", "quantity_ordered", "unit_price"],
            },
        },
    },
    "required": ["customer_name", "payment_status", "order_lines"],
}
_DOCUMENT = (
    "Section {n}. The tenant shall give notice in writing at least {m} weeks before the end of the term, addressed to "
    "the office of the landlord named in schedule {n}; a notice by telephone or by electronic mail does not suffice. "
    "Where the notice is late, the term is extended by one further period of {m} months on the same conditions.\n"
)
_CODE = '''def read_{n}(path, encoding="utf-8"):
    """Read the table {n} from a file of comma-separated values."""
    rows = []
    with open(path, encoding=encoding) as lines:
        header = next(lines).rstrip().split(",")
        for line in lines:
            fields = line.rstrip().split(",")
            if len(fields) != len(header):
                raise ValueError("a row of table {n} has another number of fields")
            rows.append(dict(zip(header, fields)))
    return rows
'''
_ROUND = (
    'Thought: I need the stock of part {n}.\nAction: search_inventory\nAction Input: {{"part_number": "P-{n}", '
    '"warehouse": "north", "include_reserved": false}}\nObservation: 17 pieces of P-{n} in the warehouse north.\n'
)


def prompts_of(kind: str, count: int, first: int = 0) -> list[str]:
    """Make the prompts of a kind of work, all of them different; `first` is the number of the first one."""
    made = []
    for i in range(first, first + count):
        if kind == "quotes":
            text = "".join(_DOCUMENT.format(n=n, m=n % 5 + 2) for n in range(i + 1, i + 7))
            made.append(f"{text}\nQuestion: What does section {i + 3} say, word by word?\nAnswer: Section {i + 3}. The")
        elif kind == "edits":
            code = "".join(_CODE.format(n=f"{name}_{i}") for name in ("orders", "parts"))
            made.append(f"{code}\n# The same functions with the delimiter as an argument:\n\ndef read_orders_{i}(path,")
        elif kind == "agent":
            made.append("".join(_ROUND.format(n=100 * i + n) for n in range(5)) + "Thought:")
        elif kind == "structured":
            made.append(f"An order of our shop, number {i}, written as JSON:\n")
        else:
            made.append(f"User: Tell me something about the number {i + 7}, and what people think of it.\nAssistant:")
    return made


KINDS = ("quotes", "edits", "agent", "structured", "chat")


@dataclass
class Measured:
    """The runs of one kind with one setting."""

    rates_tok_s: list[float] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    proposed: int = 0
    accepted: int = 0


class Bench:
    """One model, whose engine is kept for all kinds."""

    def __init__(self, llm: QuantizedHuggingFaceLLM, new_tokens: int) -> None:
        """Load the model, and its draft model if it has one."""
        self._llm = llm
        options = llm._options(None, {})
        self._draft, self.source = options.draft, "ngram" if options.draft is None else "draft"
        self._engine: Any = llm._engine(options)
        self._new_tokens = new_tokens
        tokenizer, limits = llm.pipeline.tokenizer, self._engine.limits
        self._compiler = Compiler(tokenizer, self._engine._parts.probe.vocab_size, limits.eos_token_ids)

    def _requests(self, kind: str, rows: int, speculation: str, first: int) -> list[Request]:
        options = GenerationOptions(
            max_new_tokens=self._new_tokens,
            ignore_eos=kind != "structured",
            speculation=speculation,
            draft=self._draft if speculation == "draft" else None,
        )
        mask = None
        if kind == "structured":
            mask = self._compiler.mask_factory(JSONSchema(json.dumps(_ORDER)), self._new_tokens)
        encode = self._llm.pipeline.tokenizer.encode
        return [
            request
            for prompt in prompts_of(kind, rows, first)
            for request in plan_requests(encode(prompt), options, self._engine.limits, mask=mask)
        ]

    def run(self, kind: str, rows: int, speculation: str, into: Measured, first: int) -> None:
        """Write all texts of a kind, and add their rate, from the first token of the first to the last of the last."""
        requests = self._requests(kind, rows, speculation, first)
        texts, usages, first_s = [""] * len(requests), list[Usage](), 0.0
        for chunk in self._engine.submit(requests):
            first_s = first_s or time.perf_counter()
            texts[chunk.row] += chunk.text
            if chunk.usage is not None:
                usages.append(chunk.usage)
        tokens = sum(usage.completion_tokens for usage in usages) - len(usages)
        into.rates_tok_s.append(tokens / (time.perf_counter() - first_s))
        into.texts += texts
        into.proposed += sum(usage.proposed_tokens for usage in usages)
        into.accepted += sum(usage.accepted_tokens for usage in usages)

    def compare(self, kind: str, rows: int, repeats: int) -> dict[str, Any]:
        """Measure a kind without and with proposals, in turn; the first pair, which captures, does not count."""
        plain, speculating = Measured(), Measured()
        for i in range(repeats + 1):
            if i == 1:
                plain, speculating = Measured(), Measured()
            self.run(kind, rows, "off", plain, i * rows)
            self.run(kind, rows, self.source, speculating, i * rows)
        rates = [statistics.median(one.rates_tok_s) for one in (plain, speculating)]
        pairs = zip(speculating.rates_tok_s, plain.rates_tok_s, strict=True)
        return {
            "kind": kind,
            "rows": rows,
            "plain_tok_s": round(rates[0], 1),
            "speculating_tok_s": round(rates[1], 1),
            "speed": round(statistics.median(with_them / without for with_them, without in pairs), 3),
            "proposed": speculating.proposed,
            "accepted": speculating.accepted,
            "acceptance": round(speculating.accepted / max(1, speculating.proposed), 3),
            "same_texts": sum(a == b for a, b in zip(plain.texts, speculating.texts, strict=True)) / len(plain.texts),
        }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the bench."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder or a repository")
    parser.add_argument("--quantization", default=None)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--draft", default=None, help="folder or repository of a draft model")
    parser.add_argument("--draft-quantization", default=None)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--new-tokens", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--check", action="store_true", help=f"fail below {_FLOOR} of single steps")
    parser.add_argument("--most-masked", type=int, help="on a GPU: rows with masks of which any gets proposals")
    given = parser.parse_args(arguments)
    speculation.DRAFTS_ON_GPUS = True
    if given.most_masked is not None:
        speculation.MOST_MASKED_ON_GPUS = given.most_masked
    llm = QuantizedHuggingFaceLLM(
        model_id=given.model,
        quantization=given.quantization,
        dtype=given.dtype,
        draft_model=given.draft,
        draft_quantization=given.draft_quantization,
        engine="fast",
        progress=False,
    )
    bench = Bench(llm, given.new_tokens)
    slow = []
    for kind in given.kinds:
        for rows in given.rows:
            found = bench.compare(kind, rows, given.repeats)
            print(json.dumps(found), flush=True)
            if found["speed"] < _FLOOR:
                slow.append(found)
    info = llm.engine_info
    reasons = {"no_speculation_reason": info.no_speculation_reason, "no_draft_reason": info.no_draft_reason}
    print(json.dumps({"graphs": info.graphs, "draft_models": info.draft_models, **reasons}))
    speculator = bench._engine._speculator
    print(json.dumps({"seconds": speculator.costs.seconds, "drafting_s": round(speculator.drafting_s, 2)}))
    if slow and given.check:
        sys.exit(f"slower than {_FLOOR} of single steps: {slow}")


if __name__ == "__main__":
    main()

"""Bits by layer beside the same bits for all layers: how far from 16 bits, at how many bits a weight.

    python -m benchmarks.layer_bits FOLDER --output RESULTS

Quantizes to GPTQ once for each case, `BITS` or `BITS@GROUP_SIZE`, and keeps what is in RESULTS already. Afterwards all
are compared with the unquantized model on the text that comes with the package, by their dequantized weights in one
dtype. Prints bits of a weight with scales, zero points and the order of groups; perplexity; divergence and agreement at
each token, with the interval of 95% of a bootstrap; and seconds.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from langchain_quantllm import GPTQ, Calibration, quantize
from langchain_quantllm.bench.quality import Distance, Interval, Reference, evaluation_text
from langchain_quantllm.compat.gptqmodel_rules import settings_of
from langchain_quantllm.quantization.packing import TENSORS, RoundedLinear

CASES = "3,auto:3.5,4,auto:4.25,4@32,auto:4.3125,auto:5,8"


def _quantized(case: str, asked: argparse.Namespace) -> dict[str, Any]:
    """Quantize, unless that was done before; returns folder and seconds."""
    bits, _, group_size = case.partition("@")
    output = asked.output / case.replace(":", "-")
    record = output.with_suffix(f"{output.suffix}.json")
    if not record.is_file():
        scheme = GPTQ(bits=bits, group_size=int(group_size or asked.group_size))
        texts = Calibration(samples=asked.samples)
        done = quantize(asked.folder, scheme, texts, output, device="cpu", overwrite=True, progress=False)
        record.write_text(json.dumps({"folder": str(output), "total_s": done.total_s}), encoding="utf-8")
    found: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
    return found


def _set_weights(model: Any, folder: Path) -> float:
    """Set the layers of a plain model to what a checkpoint's stand for; returns the bits of a weight, all counted."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    weights = stored_bytes = 0
    for name in [key.removesuffix(".qweight") for key in tensors if key.endswith(".qweight")]:
        own = settings_of(config, name)
        assert own is not None
        packed = {key: tensors[f"{name}.{key}"] for key in TENSORS}
        model.get_submodule(name).weight.data.copy_(RoundedLinear.unpack(packed, own["bits"]).dequantize())
        weights += model.get_submodule(name).weight.numel()
        stored_bytes += sum(tensor.nbytes for tensor in packed.values())
    return 8 * stored_bytes / weights


def _row(case: str, bits: float, found: Distance, total_s: float) -> str:
    def text(value: Interval, digits: int) -> str:
        return f"{value.mean:.{digits}f} ({value.low:.{digits}f} to {value.high:.{digits}f})"

    return (
        f"| `{case}` | {bits:.2f} | {found.perplexity.perplexity:.2f} | {text(found.kl_nats, 4)} | "
        f"{text(found.agreement, 3)} | {total_s:.0f} |"
    )


def main() -> None:
    """Quantize each case, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="an unquantized model")
    parser.add_argument("--output", type=Path, required=True, help="folder for the results")
    parser.add_argument("--cases", default=CASES)
    parser.add_argument("--group-size", type=int, default=64, help="64 divides SmolLM2's layers")
    parser.add_argument("--samples", type=int, default=128, help="most sequences of the calibration")
    parser.add_argument("--max-tokens", type=int, help="of the text to compare on; default: all")
    asked = parser.parse_args()
    asked.output.mkdir(parents=True, exist_ok=True)
    done = {case: _quantized(case, asked) for case in asked.cases.split(",")}
    model = AutoModelForCausalLM.from_pretrained(asked.folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(asked.folder)
    reference = Reference(model, tokenizer, evaluation_text(), max_tokens=asked.max_tokens)
    print(f"16 bits: perplexity {reference.perplexity.perplexity:.2f}, {reference.perplexity.tokens} tokens\n")
    print("| bits | bits of a weight | perplexity | divergence, nats | agreement | s |\n|---|---|---|---|---|---|")
    for case, record in done.items():
        bits = _set_weights(model, Path(record["folder"]))
        print(_row(case, bits, reference.distance(model), record["total_s"]), flush=True)


if __name__ == "__main__":
    main()

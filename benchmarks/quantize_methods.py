"""Methods of 4 bits side by side: how far from 16 bits, how long, how much memory.

    python -m benchmarks.quantize_methods FOLDER --output RESULTS

Each method quantizes in a process of its own, with the same calibration and groups; results that are in RESULTS already
are taken over. Libraries that are not installed here come from a folder of their own, `--site autoround=FOLDER`, as
`pip install --target FOLDER --no-deps auto-round` makes it. Afterwards all are compared with the unquantized model on
the text that comes with the package, by their dequantized weights in one dtype, so that no kernel plays a part.

Prints a table: perplexity; divergence, loss above 16 bits and agreement at each token, with the interval of 95% of a
bootstrap; how many tokens of greedy answers are the same, of 48; CPU seconds, of which a busy machine changes less than
of seconds, and the largest resident memory.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from langchain_quantllm.bench.compare import PROMPTS
from langchain_quantllm.bench.quality import Distance, Interval, Reference, evaluation_text
from langchain_quantllm.compat.bitsandbytes import import_quietly
from langchain_quantllm.compat.bitsandbytes_scales import refine_state
from langchain_quantllm.quantization.packing import TENSORS, RoundedLinear

ANSWER_TOKENS = 48
_DENSE = "dense.safetensors"


# --- methods: each writes a folder, with packed layers of GPTQ's format or with dense ones ---


def _ours(
    folder: Path, output: Path, asked: argparse.Namespace, *, scheme: dict[str, Any] | None = None, **options: Any
) -> None:
    from langchain_quantllm import GPTQ, Calibration, quantize

    scheme = {"bits": 4, "group_size": asked.group_size, **(scheme or {})}
    if options.get("method") != "rtn":
        options["calibration"] = Calibration(samples=asked.samples, tokens=asked.tokens)
    quantize(folder, GPTQ(**scheme), output=output, device="cpu", overwrite=True, progress=False, **options)


def _rtn(folder: Path, output: Path, asked: argparse.Namespace) -> None:
    _ours(folder, output, asked, method="rtn")


def _gptq_asymmetric(folder: Path, output: Path, asked: argparse.Namespace) -> None:
    _ours(folder, output, asked, scheme={"sym": False})


def _act_order(folder: Path, output: Path, asked: argparse.Namespace) -> None:
    _ours(folder, output, asked, scheme={"desc_act": True})


def _group_32(folder: Path, output: Path, asked: argparse.Namespace) -> None:
    _ours(folder, output, asked, scheme={"group_size": 32})


def _blocks(folder: Path, output: Path, asked: argparse.Namespace) -> None:
    _ours(folder, output, asked, method="autoround")


def _distilled(folder: Path, output: Path, asked: argparse.Namespace) -> None:
    from langchain_quantllm import Distillation

    _ours(folder, output, asked, distill=Distillation(epochs=asked.epochs))


def _gptqmodel(folder: Path, output: Path, asked: argparse.Namespace) -> None:
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    config = QuantizeConfig(bits=4, group_size=asked.group_size, sym=True, desc_act=False)
    model = GPTQModel.load(str(folder), config, device="cpu")
    rows = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in _calibration(folder, asked)]
    model.quantize(rows, batch_size=8, backend=BACKEND.TORCH)
    model.save(str(output))


def _autoround(folder: Path, output: Path, asked: argparse.Namespace) -> None:
    from auto_round import AutoRound  # type: ignore[import-not-found]

    rows = [{"input_ids": torch.tensor([ids])} for ids in _calibration(folder, asked)]
    rows = [{**row, "attention_mask": torch.ones_like(row["input_ids"])} for row in rows]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    options: dict[str, Any] = {"bits": 4, "group_size": asked.group_size, "sym": True, "dataset": rows}
    options |= {
        "iters": asked.iterations,
        "batch_size": 4,
        "nsamples": len(rows),
        "seqlen": rows[0]["input_ids"].numel(),
    }
    tuned = AutoRound(
        model, AutoTokenizer.from_pretrained(folder), device_map="cpu", enable_torch_compile=False, **options
    )
    tuned.quantize_and_save(str(output), format="auto_gptq")


def _llmcompressor(folder: Path, output: Path, asked: argparse.Namespace) -> None:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme  # type: ignore[import-not-found]
    from datasets import Dataset
    from llmcompressor import oneshot  # type: ignore[import-not-found]
    from llmcompressor.modifiers.gptq import GPTQModifier  # type: ignore[import-not-found]

    ids = _calibration(folder, asked)
    weights = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=asked.group_size)
    groups = {"all": QuantizationScheme(targets=["Linear"], weights=weights)}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    oneshot(
        model=model,
        dataset=Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]}),
        recipe=GPTQModifier(config_groups=groups, ignore=["lm_head"], dampening_frac=0.01),
        max_seq_length=len(ids[0]),
        num_calibration_samples=len(ids),
    )
    _save_dense(output, {name: module.weight for name, module in _linears(model)})


def _four_bit(kind: str, *, refined: bool) -> Callable[[Path, Path, argparse.Namespace], None]:
    def run(folder: Path, output: Path, _: argparse.Namespace) -> None:
        import_quietly()
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        found = {}
        for name, module in _linears(AutoModelForCausalLM.from_pretrained(folder, dtype="auto")):
            octets, state = quantize_4bit(module.weight.data, quant_type=kind)
            if refined:
                refine_state(octets, state, module.weight.data)
            found[name] = dequantize_4bit(octets, state)
        _save_dense(output, found)

    return run


METHODS: dict[str, Callable[[Path, Path, argparse.Namespace], None]] = {
    "rtn": _rtn,
    "gptq": _ours,
    "gptq-asymmetric": _gptq_asymmetric,
    "gptq-act-order": _act_order,
    "gptq-32": _group_32,
    "gptq-autoround": _blocks,
    "gptq-distilled": _distilled,
    "gptqmodel": _gptqmodel,
    "autoround": _autoround,
    "llmcompressor": _llmcompressor,
    "nf4-bitsandbytes": _four_bit("nf4", refined=False),
    "nf4": _four_bit("nf4", refined=True),
    "fp4-bitsandbytes": _four_bit("fp4", refined=False),
    "fp4": _four_bit("fp4", refined=True),
}


def _calibration(folder: Path, asked: argparse.Namespace) -> list[list[int]]:
    """Return the token ids of the package's calibration; kept in a file, as a library may need its own transformers."""
    file = asked.output / "calibration.json"
    if not file.is_file():
        from langchain_quantllm.quantization.calibration import Calibration, read_texts, sequences

        calibration = Calibration(samples=asked.samples, tokens=asked.tokens)
        ids = sequences(calibration, read_texts(calibration), AutoTokenizer.from_pretrained(folder), None)
        file.write_text(json.dumps(ids), encoding="utf-8")
    found: list[list[int]] = json.loads(file.read_text(encoding="utf-8"))
    return found


def _linears(model: Any) -> Iterator[tuple[str, Any]]:
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and module is not head:
            yield name, module


def _save_dense(output: Path, weights: dict[str, torch.Tensor]) -> None:
    output.mkdir(parents=True, exist_ok=True)
    save_file({name: weight.detach().contiguous() for name, weight in weights.items()}, output / _DENSE)


def _run_method(method: str, asked: argparse.Namespace) -> None:
    """Quantize in this process, and write what it took."""
    began = time.perf_counter()
    METHODS[method](asked.folder, asked.output / method, asked)
    used = resource.getrusage(resource.RUSAGE_SELF)
    took = {
        "total_s": time.perf_counter() - began,
        "cpu_s": used.ru_utime + used.ru_stime,
        "peak_bytes": used.ru_maxrss * 1024,
    }
    (asked.output / f"{method}.json").write_text(json.dumps(took), encoding="utf-8")


def _run_apart(method: str, asked: argparse.Namespace) -> dict[str, float] | None:
    """Quantize in a process of its own, unless that was done before; None if it fails."""
    file = asked.output / f"{method}.json"
    if not file.is_file():
        sites = [site.partition("=")[2] for site in asked.site if site.startswith(f"{method}=")]
        paths = [*sites, os.environ.get("PYTHONPATH", str(Path.cwd()))]
        with (asked.output / f"{method}.log").open("w", encoding="utf-8") as log:
            subprocess.run(
                [sys.executable, "-m", "benchmarks.quantize_methods", *sys.argv[1:], "--only", method],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
                stdout=log,
                stderr=log,
                check=False,
            )
    if not file.is_file():
        print(f"{method} failed; see {asked.output / method}.log", flush=True)
        return None
    found: dict[str, float] = json.loads(file.read_text(encoding="utf-8"))
    return found


# --- comparison ---


def _set_weights(model: Any, folder: Path) -> None:
    """Set the linear layers of a plain model to the weights that a method's folder stands for."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.rglob("*.safetensors")):  # AutoRound writes into a folder of its own below it
        tensors |= load_file(file)
    dense = tensors if (folder / _DENSE).is_file() else {}
    for name in [key.removesuffix(".qweight") for key in tensors if key.endswith(".qweight")]:
        rounded = RoundedLinear.unpack({key: tensors[f"{name}.{key}"] for key in TENSORS}, bits=4)
        dense[name] = rounded.dequantize()
    missing = {name for name, _ in _linears(model)} ^ dense.keys()
    if missing:
        msg = f"{folder} has other layers than the model: {sorted(missing)[0]}"
        raise ValueError(msg)
    for name, weight in dense.items():
        model.get_submodule(name).weight.data.copy_(weight)


def _prompts(tokenizer: Any) -> list[list[int]]:
    """Return the token ids of the prompts, as the first messages of a chat where there is a template."""
    found = []
    for prompt in PROMPTS:
        message = [{"role": "user", "content": prompt}]
        options = {"tokenize": False, "add_generation_prompt": True}
        text = tokenizer.apply_chat_template(message, **options) if tokenizer.chat_template else prompt
        found.append(list(tokenizer(text, add_special_tokens=False)["input_ids"]))
    return found


def _answers(model: Any, prompts: list[list[int]]) -> list[list[int]]:
    found = []
    for ids in prompts:
        prompt = torch.tensor([ids])
        options = {"max_new_tokens": ANSWER_TOKENS, "do_sample": False, "repetition_penalty": 1.0}
        out = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
        found.append(out[0, len(ids) :].tolist())
    return found


def _same_tokens(model: Any, prompts: list[list[int]], answers: list[list[int]]) -> float:
    """Return the mean number of tokens before a greedy answer parts from another model's.

    One forward over prompt and answer tells: up to where they part, both have seen the same tokens.
    """
    counts = []
    for prompt, answer in zip(prompts, answers, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer[:-1]]), use_cache=False).logits[0, len(prompt) - 1 :]
        same = (logits.argmax(-1) == torch.tensor(answer)).int()
        counts.append(int(same.cumprod(0).sum()))
    return sum(counts) / len(counts)


def _row(method: str, found: Distance, same: float, took: dict[str, float]) -> str:
    def text(value: Interval, digits: int) -> str:
        return f"{value.mean:.{digits}f} ({value.low:.{digits}f} to {value.high:.{digits}f})"

    return (
        f"| `{method}` | {found.perplexity.perplexity:.2f} | {text(found.kl_nats, 4)} | "
        f"{text(found.loss_increase_nats, 3)} | {text(found.agreement, 3)} | {same:.1f} | "
        f"{took['cpu_s']:.0f} | {took['peak_bytes'] / 1e9:.2f} |"
    )


def _compare(asked: argparse.Namespace, took: dict[str, dict[str, float]]) -> None:
    dtype = getattr(torch, asked.dtype)
    tokenizer = AutoTokenizer.from_pretrained(asked.folder)
    model = AutoModelForCausalLM.from_pretrained(asked.folder, dtype=dtype).eval()
    reference = Reference(model, tokenizer, evaluation_text(), max_tokens=asked.max_tokens)
    prompts = _prompts(tokenizer)
    answers = _answers(model, prompts)
    print(f"16 bits: perplexity {reference.perplexity.perplexity:.2f}, {reference.perplexity.tokens} tokens\n")
    print("| method | perplexity | divergence, nats | loss above 16 bits | agreement | same tokens | CPU s | peak GB |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for method, used in took.items():
        _set_weights(model, asked.output / method)
        same = _same_tokens(model, prompts, answers)
        print(_row(method, reference.distance(model), same, used), flush=True)


def main() -> None:
    """Quantize with each method, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="an unquantized model")
    parser.add_argument("--output", type=Path, required=True, help="folder for the results")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--group-size", type=int, default=64, help="64 divides SmolLM2's layers")
    parser.add_argument("--samples", type=int, default=128, help="most sequences of the calibration")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of each")
    parser.add_argument("--epochs", type=int, default=4, help="of gptq-distilled")
    parser.add_argument("--iterations", type=int, default=50, help="of autoround; its own default is 200")
    parser.add_argument("--max-tokens", type=int, help="of the text to compare on; default: all")
    parser.add_argument("--dtype", default="float32", help="in which models are compared")
    parser.add_argument("--site", action="append", default=[], help="METHOD=FOLDER of a library")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    asked.output.mkdir(parents=True, exist_ok=True)
    if asked.only:
        _run_method(asked.only, asked)
        return
    _calibration(asked.folder, asked)
    took = {method: _run_apart(method, asked) for method in asked.methods.split(",")}
    _compare(asked, {method: used for method, used in took.items() if used is not None})


if __name__ == "__main__":
    main()

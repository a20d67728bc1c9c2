"""Option names of other libraries, and what to write for them here.

Owns one table for the fields of the classes and the options of a call: names of transformers, HuggingFacePipeline,
OpenAI, Ollama, llama.cpp and vLLM that are no names here, each with what to do. Checks no value.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal, NamedTuple

Kind = Literal["llm", "chat"]
"""The class that is asked: the LLM, or the chat model."""


class _ByKind(NamedTuple):
    """Advice that differs between the classes."""

    llm: str
    chat: str


_NOT_TEXT = "text is returned; call .pipeline yourself for other outputs (logprobs=True gives the probabilities)"
_REMOTE = "transformers moved this strategy out to code on the Hub, which is not run here"
_ASSISTED = "decoding with a second model is not offered; prompt_lookup_num_tokens=10 needs none"
_PENALTY = (
    "it subtracts from scores, and repetition_penalty= is another formula, which divides them: 1.0 changes nothing, "
    "1.1 is usual, below 1 invites repetition; leave it out, or try repetition_penalty=1.1"
)
_SERVER = "the model runs in this process and there is no server; leave it out"
_ACCESS = "a model in this process needs no key; token= is for the Hub alone"
_REQUEST = "there is no request over a network; leave it out"
_CONTEXT = (
    "the checkpoint says how long its context is and the KV cache grows by need; max_length= bounds prompt and "
    "completion together, kv_cache_memory= the cache"
)
_LENGTH = "write max_new_tokens="
_MIN_LENGTH = "write min_new_tokens="
_STOP = "write stop=, a list of strings"
_MIROSTAT = "mirostat is not offered; min_p=0.05 keeps samples sensible in a like way"
_TAIL = "tail-free sampling is not offered; min_p=0.05 cuts the unlikely tail as well"
_LAYERS = (
    "the whole model goes onto one device; device=-1 is the CPU, device_map='auto' spreads it over several devices"
)
_SPREAD = "write device_map='auto', which spreads the layers over the GPUs"
_THREADS = "call torch.set_num_threads, or set OMP_NUM_THREADS, before the model is loaded"
_BATCH = "the engine batches by itself; batch_size= bounds the rows that run beside each other"
_MAPPED = "weights are read from safetensors, which are mapped into memory anyway; leave it out"
_ROPE = "the checkpoint's config says how positions turn; change rope_parameters in its config.json"
_LORA = "write adapters={'name': 'folder'} and adapter='name'"
_CACHE_DTYPE = "the KV cache has the dtype of the model; kv_cache_memory= bounds it"
_BIAS = "write sequence_bias={(token_id,): 2.0}, whose keys are tuples of token ids"
_LAST_N = "repetition_penalty= looks at the whole text; leave it out"
_NO_BEST = "write n=, and choose among the completions yourself"
_4BIT = "write quantization=NF4({}) after `from langchain_quantllm import NF4`"
_INT8 = "write quantization=Int8({}) after `from langchain_quantllm import Int8`"
_ADD_CONTEXT = "put it into the prompt"
_FETCHING = "transformers 5 does this by itself; leave it out"
_QUANTIZED = "write quantization='gptq', or quantization=GPTQ(bits=4) to make sure of what the checkpoint has"
_STRUCTURED = _ByKind(
    "an LLM returns any text; use ChatQuantizedHuggingFace and its with_structured_output(schema)",
    "use .with_structured_output(schema), or give constraint= at the call, of langchain_quantllm.structured",
)
_SYSTEM = _ByKind("put it into the prompt", "put it into the messages: [('system', '...'), ('human', '...')]")
_MESSAGES = _ByKind(
    "an LLM takes a text; use ChatQuantizedHuggingFace for messages",
    "messages are the input of a call: .invoke(messages)",
)
_TEMPLATE = _ByKind(
    "an LLM takes the text as it is; ChatQuantizedHuggingFace has chat_template", "write chat_template="
)
_THINKING = _ByKind(
    "an LLM continues a text; ChatQuantizedHuggingFace has chat_template_kwargs",
    "write chat_template_kwargs={'enable_thinking': False}, or the variable that the model's template has",
)
_STREAM = _ByKind("use .stream(prompt)", "use .stream(messages), or streaming=True")
_RETRIES = _ByKind(_REQUEST, "write max_retries=, which is taken and does nothing: " + _REQUEST)


def _chat_call(name: str) -> _ByKind:
    return _ByKind(
        f"an LLM takes a text and has no {name}; use ChatQuantizedHuggingFace",
        f"it is an option of a call: .bind({name}=...)",
    )


COUNTERPARTS: Mapping[str, str | _ByKind] = {
    # transformers: generate, its pipelines, from_pretrained.
    **dict.fromkeys(
        (
            "output_attentions",
            "output_hidden_states",
            "output_scores",
            "output_logits",
            "return_dict_in_generate",
            "return_tensors",
            "return_text",
            "return_type",
        ),
        _NOT_TEXT,
    ),
    **dict.fromkeys(
        (
            "penalty_alpha",
            "dola_layers",
            "low_memory",
            "diversity_penalty",
            "num_beam_groups",
            "constraints",
            "force_words_ids",
            "custom_generate",
        ),
        _REMOTE,
    ),
    **dict.fromkeys(
        (
            "is_assistant",
            "assistant_model",
            "assistant_tokenizer",
            "num_assistant_tokens",
            "num_assistant_tokens_schedule",
            "assistant_confidence_threshold",
            "assistant_early_exit",
            "assistant_lookbehind",
            "target_lookbehind",
            "assistant_ensemble_weight",
            "speculation_type",
            "use_mtp",
            "draft_model",
            "speculative_model",
            "speculative_config",
        ),
        _ASSISTED,
    ),
    "watermarking_config": "a watermark would come after the token is drawn; use .pipeline for it",
    "watermark": "a watermark would come after the token is drawn; use .pipeline for it",
    "token_healing": "it changes the prompt's own tokens; end the prompt at a word instead",
    "continuous_batching_config": "the engine batches by itself",
    "streamer": _STREAM,
    "logits_processor": "it would act on other callers' rows too; use .pipeline for it",
    "logits_processors": "it would act on other callers' rows too; use .pipeline for it",
    "stopping_criteria": "it would act on other callers' rows too; use stop=[...] or .pipeline",
    "generation_config": "pass its fields by name: **generation_config.to_diff_dict()",
    "prefix": _ADD_CONTEXT,
    "batch_size": "write batch_size=8",
    "clean_up_tokenization_spaces": "the text comes as the model wrote it",
    "documents": _ADD_CONTEXT,
    "continue_final_message": _ByKind(
        "an LLM takes a prompt, not messages",
        "a chat model answers with a message of its own; use QuantizedHuggingFaceLLM",
    ),
    "tokenizer_encode_kwargs": "use add_special_tokens= and truncation=",
    "torch_dtype": "transformers 5 calls it dtype: write dtype=",
    "low_cpu_mem_usage": _FETCHING,
    "resume_download": _FETCHING,
    "use_fast": _FETCHING,
    "force_download": "delete the repository from the Hub's cache, by `hf cache rm`, and load again",
    "proxies": "set HTTPS_PROXY in the environment",
    "subfolder": "give the folder itself as model_id=; of a repository, download it first",
    "offload_folder": "write model_kwargs={'offload_folder': '...'}",
    "use_flash_attention_2": "write attn_implementation='flash_attention_2'",
    "flash_attn": "write attn_implementation='flash_attention_2', or leave it out: PyTorch's own is fused too",
    "flash_attention": "write attn_implementation='flash_attention_2', or leave it out: PyTorch's own is fused too",
    "tokenizer": "it comes with the checkpoint; give one of your own by pipeline=",
    "tokenizer_id": "it comes with the checkpoint; give one of your own by pipeline=",
    "config": "it comes with the checkpoint; change fields of it by model_kwargs={...}",
    "framework": "the models run in PyTorch; leave it out",
    "gguf_file": "convert the file once, langchain-quantllm convert FILE FOLDER, and give model_id='FOLDER'",
    "load_in_4bit": "write quantization='nf4'",
    "load_in_8bit": "write quantization='int8'",
    "use_4bit": "write quantization='nf4'",
    "use_8bit": "write quantization='int8'",
    "bnb_4bit_quant_type": "write quantization='nf4' or quantization='fp4'",
    "bnb_4bit_compute_dtype": _4BIT.format("compute_dtype='bfloat16'"),
    "bnb_4bit_use_double_quant": "write quantization='nf4-double'",
    "bnb_4bit_quant_storage": _4BIT.format("storage_dtype='bfloat16'"),
    "llm_int8_threshold": _INT8.format("threshold=6.0"),
    "llm_int8_skip_modules": _INT8.format("skip_modules=['lm_head']"),
    "llm_int8_enable_fp32_cpu_offload": _INT8.format("fp32_cpu_offload=True"),
    "llm_int8_has_fp16_weight": "it is for training; leave it out",
    "bits": _QUANTIZED,
    "wbits": _QUANTIZED,
    "group_size": _QUANTIZED,
    "desc_act": _QUANTIZED,
    # HuggingFacePipeline, HuggingFaceEndpoint, ChatHuggingFace.
    "backend": _ByKind("it belongs to from_model_id: from_model_id(model_id, backend='default')", "leave it out"),
    "task": _ByKind("it belongs to from_model_id: from_model_id(model_id, task='text-generation')", "leave it out"),
    "repo_id": "write model_id=",
    "endpoint_url": _SERVER,
    "inference_server_url": _SERVER,
    "provider": _SERVER,
    "server_kwargs": _SERVER,
    "huggingfacehub_api_token": _ACCESS,
    "hf_token": _ACCESS,
    "use_auth_token": _ACCESS,
    "streaming": "use .stream(prompt)",
    "stop_sequences": _STOP,
    # What a chat model has and an LLM has not, and options of a chat model's calls that are no fields.
    "tools": _ByKind(
        "an LLM takes a text and has no tools; use ChatQuantizedHuggingFace and its bind_tools(tools)",
        "give them to .bind_tools(tools)",
    ),
    "functions": _ByKind(
        "an LLM takes a text and has no tools; use ChatQuantizedHuggingFace and its bind_tools(tools)",
        "give them to .bind_tools(tools)",
    ),
    "function_call": _ByKind(
        "an LLM takes a text and has no tools; use ChatQuantizedHuggingFace and its bind_tools(tools)",
        "write .bind_tools(tools, tool_choice='name')",
    ),
    "tool_choice": _ByKind(
        "an LLM takes a text and has no tools; use ChatQuantizedHuggingFace and its bind_tools(tools)",
        "give it to .bind_tools(tools, tool_choice='any')",
    ),
    "parallel_tool_calls": _ByKind(
        "an LLM takes a text and has no tools; use ChatQuantizedHuggingFace and its bind_tools(tools)",
        "give it to .bind_tools(tools, parallel_tool_calls=False)",
    ),
    "constraint": _chat_call("constraint"),
    "strict": _chat_call("strict"),
    "response_format": _STRUCTURED,
    "chat_template": _TEMPLATE,
    "chat_template_kwargs": _THINKING,
    "template": _TEMPLATE,
    "chat_format": _TEMPLATE,
    "tool_format": "an LLM takes a text and has no tools; use ChatQuantizedHuggingFace",
    "messages": _MESSAGES,
    "prompt": _ByKind(
        "it is the input of a call: .invoke(prompt)", "messages are the input of a call: .invoke(messages)"
    ),
    "system": _SYSTEM,
    "system_prompt": _SYSTEM,
    "reasoning": _THINKING,
    "reasoning_effort": _THINKING,
    "think": _THINKING,
    "enable_thinking": _THINKING,
    "rate_limiter": _REQUEST,
    "disable_streaming": "use .invoke(prompt), which does not stream",
    # OpenAI's API, and LangChain's classes over it.
    "api_key": _ACCESS,
    "openai_api_key": _ACCESS,
    "base_url": _SERVER,
    "openai_api_base": _SERVER,
    "api_base": _SERVER,
    "host": _SERVER,
    "port": _SERVER,
    "organization": _SERVER,
    "openai_organization": _SERVER,
    "openai_proxy": _SERVER,
    "http_client": _SERVER,
    "http_async_client": _SERVER,
    "client_kwargs": _SERVER,
    "async_client_kwargs": _SERVER,
    "sync_client_kwargs": _SERVER,
    "default_headers": _SERVER,
    "headers": _SERVER,
    "default_query": _SERVER,
    "extra_headers": _SERVER,
    "extra_body": "give what it holds by name",
    "service_tier": _SERVER,
    "store": _SERVER,
    "user": "leave it out; the metadata of a call's config takes notes",
    "presence_penalty": _PENALTY,
    "frequency_penalty": _PENALTY,
    "logit_bias": _BIAS,
    "max_completion_tokens": _LENGTH,
    "max_output_tokens": _LENGTH,
    "best_of": _NO_BEST,
    "echo": _ByKind("write return_full_text=True", "a chat model returns messages; leave it out"),
    "suffix": "write the prompt that the model was trained with for filling in, and put the suffix there",
    "stream": _STREAM,
    "stream_options": "streams report their usage anyway; leave it out",
    "stream_usage": "streams report their usage anyway; leave it out",
    "request_timeout": "write timeout=, in seconds",
    "max_retries": _RETRIES,
    "tiktoken_model_name": "tokens are counted by the model's own tokenizer; leave it out",
    # Ollama and llama.cpp.
    "model_path": "write model_id=, a folder or a repository's name; a .gguf file is converted first",
    "num_ctx": _CONTEXT,
    "n_ctx": _CONTEXT,
    "context_length": _CONTEXT,
    "context_window": _CONTEXT,
    "max_context_length": _CONTEXT,
    "num_predict": _LENGTH,
    "n_predict": _LENGTH,
    "num_gpu": _LAYERS,
    "n_gpu_layers": _LAYERS,
    "gpu_layers": _LAYERS,
    "main_gpu": "write device='cuda:0'",
    "tensor_split": _SPREAD + "; max_memory={0: '10GiB'} bounds each",
    "split_mode": _SPREAD,
    "num_thread": _THREADS,
    "n_threads": _THREADS,
    "threads": _THREADS,
    "num_batch": _BATCH,
    "n_batch": _BATCH,
    "n_ubatch": _BATCH,
    "use_mmap": _MAPPED,
    "use_mlock": _MAPPED,
    "low_vram": "write quantization='nf4', or device_map='auto'",
    "vocab_only": "leave it out",
    "f16_kv": _CACHE_DTYPE,
    "cache_type_k": _CACHE_DTYPE,
    "cache_type_v": _CACHE_DTYPE,
    "type_k": _CACHE_DTYPE,
    "type_v": _CACHE_DTYPE,
    "offload_kqv": _CACHE_DTYPE,
    "logits_all": "write logprobs=True",
    "repeat_penalty": "write repetition_penalty=, the same formula over the whole text",
    "repeat_last_n": _LAST_N,
    "last_n_tokens_size": _LAST_N,
    "penalize_newline": _LAST_N,
    "mirostat": _MIROSTAT,
    "mirostat_mode": _MIROSTAT,
    "mirostat_eta": _MIROSTAT,
    "mirostat_tau": _MIROSTAT,
    "tfs_z": _TAIL,
    "top_a": _TAIL,
    "typical": "write typical_p=",
    "format": _STRUCTURED,
    "grammar": _STRUCTURED,
    "grammar_path": _STRUCTURED,
    "keep_alive": "the model stays in memory until .unload() or the last object that holds it goes; leave it out",
    "raw": _ByKind(
        "an LLM takes the text as it is; leave it out", "use QuantizedHuggingFaceLLM, which uses no template"
    ),
    "rope_freq_base": _ROPE,
    "rope_freq_scale": _ROPE,
    "rope_scaling": _ROPE,
    "lora_path": _LORA,
    "lora_base": _LORA,
    # vLLM.
    "tensor_parallel_size": _SPREAD,
    "pipeline_parallel_size": _SPREAD,
    "gpu_memory_utilization": "write kv_cache_memory=0.5, the fraction of the free memory that the KV cache may take",
    "kv_cache_dtype": _CACHE_DTYPE,
    "max_model_len": _CONTEXT,
    "max_num_seqs": _BATCH,
    "max_num_batched_tokens": _BATCH,
    "swap_space": "leave it out; requests wait where the KV cache is full",
    "block_size": "leave it out; the engine chooses it",
    "cpu_offload_gb": "write device_map='auto' with max_memory={0: '10GiB', 'cpu': '30GiB'}",
    "enforce_eager": "leave it out; graphs are used where they give the same, and engine_info says so",
    "enable_prefix_caching": "write prefix_caching=",
    "enable_lora": _LORA,
    "max_loras": _LORA,
    "lora_request": "write adapter='name', one of adapters=",
    "download_dir": "write cache_dir=",
    "load_format": "write use_safetensors=",
    "vllm_kwargs": "give what it holds by name",
    "llm_kwargs": "give what it holds by name",
    "use_beam_search": "write num_beams=",
    "beam_width": "write num_beams=",
    "stop_token_ids": "write eos_token_id=[...], which replaces the checkpoint's, so list these too",
    "min_tokens": _MIN_LENGTH,
    "prompt_logprobs": "only the completion's are reported: logprobs=",
    "include_stop_str_in_output": "stop strings are cut off; add them yourself",
    "spaces_between_special_tokens": "the text comes as the model wrote it",
    "detokenize": _NOT_TEXT,
    "bad_words": "write bad_words_ids=[[...]], lists of token ids",
    "allowed_token_ids": "it is not offered; suppress_tokens=[...] lists those that are not allowed",
    "truncate_prompt_tokens": "write truncation='left' with max_length=",
    "guided_json": _STRUCTURED,
    "guided_regex": _STRUCTURED,
    "guided_choice": _STRUCTURED,
    "guided_grammar": _STRUCTURED,
    "guided_decoding_backend": _STRUCTURED,
    "structured_outputs": _STRUCTURED,
    # Names that many use for the same things.
    "checkpoint": "write model_id=",
    "model_dir": "write model_id=",
    "path": "write model_id=",
    "device_id": "write device=0",
    "device_ids": _SPREAD,
    "gpu": "write device=0",
    "use_gpu": "a GPU is used where there is one; device=-1 is the CPU",
    "cuda": "a GPU is used where there is one; device=-1 is the CPU",
    "fp16": "write dtype='float16'",
    "bf16": "write dtype='bfloat16'",
    "half": "write dtype='float16'",
    "precision": "write dtype='bfloat16', or quantization= for fewer bits",
    "lora": _LORA,
    "peft_model_id": _LORA,
    "adapter_name": "write adapter='name'",
}
"""What to do for a name that is none here. A name of ours stands in it as `name=` or `.name(`."""

_SECRET = re.compile(
    r"(.*_)?(key|token|secret|password|credentials?|auth|authorization|headers?|cookies?|proxy|proxies)"
)
_OURS = re.compile(r"(?<![\w(])([a-z]\w*)=")


def advice(name: str, kind: Kind) -> str | None:
    """Say what to do for an option name of another library; None where the name is unknown.

    Args:
        name: The name.
        kind: The class that is asked.
    """
    found = COUNTERPARTS.get(name)
    return getattr(found, kind) if isinstance(found, _ByKind) else found


def names_advised(text: str) -> list[str]:
    """List the options that an advice names, but for those inside of a call's brackets."""
    return _OURS.findall(text)


def written(name: str, value: object) -> str:
    """Write an option with its value as a user would, a secret without."""
    is_secret = _SECRET.fullmatch(name.lower()) or COUNTERPARTS.get(name) in (
        _SERVER,
        _ACCESS,
    )  # an address may hold one
    return f"{name}=..." if is_secret else f"{name}={value!r}"

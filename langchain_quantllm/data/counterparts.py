"""Names and values of other libraries, and what to write for them here.

Owns the advice for option names of transformers, HuggingFacePipeline, OpenAI, Ollama, llama.cpp and vLLM that are no
names here, and for values of `quantization` that name no scheme. Checks no option.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

Kind = Literal["llm", "chat"]
"""The kind of a class: the LLM, or the chat model."""

_SERVER = (
    "the model runs in this process; leave it out, or name a server of the model by "
    "engine=Server('http://host:8000/v1')"
)
_ACCESS = (
    "a model in this process needs no key; token= is for the Hub alone, and a server's key stands in engine=Server(...)"
)
_NO_TOOLS = "an LLM takes a text and has no tools; use ChatQuantizedHuggingFace and its bind_tools(tools)"

_ROWS: Mapping[str, str | tuple[str, str]] = {
    # transformers: generate, its pipelines, from_pretrained.
    (
        "output_attentions output_hidden_states output_scores output_logits return_dict_in_generate return_tensors "
        "return_text return_type detokenize"
    ): "only text is returned; call .pipeline yourself for other outputs (logprobs=True gives the probabilities)",
    (
        "penalty_alpha dola_layers low_memory diversity_penalty num_beam_groups constraints force_words_ids "
        "custom_generate"
    ): "transformers moved this strategy to code on the Hub, which is not run here",
    (
        "assistant_model speculative_model speculative_config model_draft draft_model_name_or_path"
    ): "a small model of the same vocabulary that proposes tokens is draft_model=",
    (
        "is_assistant num_assistant_tokens num_assistant_tokens_schedule assistant_confidence_threshold "
        "num_speculative_tokens draft_max draft_min"
    ): "how many tokens are proposed follows from what is measured; leave it out",
    (
        "assistant_tokenizer assistant_early_exit assistant_lookbehind target_lookbehind assistant_ensemble_weight "
        "speculation_type use_mtp"
    ): "this way to propose tokens is not offered; use draft_model= or speculation='ngram'",
    "watermarking_config watermark": "a watermark would come after the token is sampled; use .pipeline for it",
    "token_healing": "it changes the prompt's own tokens; end the prompt at a word instead",
    "continuous_batching_config": "the engine batches by itself",
    "streamer stream": ("use .stream(prompt)", "use .stream(messages), or streaming=True"),
    "logits_processor logits_processors": "it would act on other callers' sequences too; use .pipeline for it",
    "stopping_criteria": "it would act on other callers' sequences too; use stop=[...] or .pipeline",
    "generation_config": "pass its fields by name: **generation_config.to_diff_dict()",
    "prefix documents": "put it into the prompt",
    "batch_size": "write batch_size=8",
    "clean_up_tokenization_spaces spaces_between_special_tokens": "the text comes as the model wrote it",
    "continue_final_message": (
        "an LLM takes a prompt, not messages",
        "a chat model answers with a message of its own; use QuantizedHuggingFaceLLM",
    ),
    "tokenizer_encode_kwargs": "use add_special_tokens= and truncation=",
    "torch_dtype": "transformers 5 calls it dtype: write dtype=",
    "low_cpu_mem_usage resume_download use_fast": "transformers 5 does this by itself; leave it out",
    "force_download": "delete the repository from the Hub's cache, by `hf cache rm`, and load again",
    "proxies": "set HTTPS_PROXY in the environment",
    "subfolder": "give the folder itself as model_id=; of a repository, download it first",
    "offload_folder": "write model_kwargs={'offload_folder': '...'}",
    "use_flash_attention_2": "write attn_implementation='flash_attention_2'",
    "flash_attn flash_attention": (
        "write attn_implementation='flash_attention_2', or leave it out: PyTorch's own is fused too"
    ),
    "tokenizer tokenizer_id": "it comes with the checkpoint; give one of your own by pipeline=",
    "config": "it comes with the checkpoint; change fields of it by model_kwargs={...}",
    "framework": "the models run in PyTorch; leave it out",
    "gguf_file": "convert the file once, langchain-quantllm convert FILE FOLDER, and give model_id='FOLDER'",
    "load_in_4bit use_4bit": "write quantization='nf4'",
    "load_in_8bit use_8bit": "write quantization='int8'",
    "bnb_4bit_quant_type": "write quantization='nf4' or quantization='fp4'",
    "bnb_4bit_compute_dtype": (
        "write quantization=NF4(compute_dtype='bfloat16') after `from langchain_quantllm import NF4`"
    ),
    "bnb_4bit_use_double_quant": "write quantization='nf4-double'",
    "bnb_4bit_quant_storage": (
        "write quantization=NF4(storage_dtype='bfloat16') after `from langchain_quantllm import NF4`"
    ),
    "llm_int8_threshold": "write quantization=Int8(threshold=6.0) after `from langchain_quantllm import Int8`",
    "llm_int8_skip_modules": (
        "write quantization=Int8(skip_modules=['lm_head']) after `from langchain_quantllm import Int8`"
    ),
    "llm_int8_enable_fp32_cpu_offload": (
        "write quantization=Int8(fp32_cpu_offload=True) after `from langchain_quantllm import Int8`"
    ),
    "llm_int8_has_fp16_weight": "it is for training; leave it out",
    "bits wbits group_size desc_act": (
        "write quantization='gptq', or quantization=GPTQ(bits=4) to make sure of what the checkpoint has"
    ),
    # HuggingFacePipeline, HuggingFaceEndpoint, ChatHuggingFace.
    "backend": ("it belongs to from_model_id: from_model_id(model_id, backend='default')", "leave it out"),
    "task": ("it belongs to from_model_id: from_model_id(model_id, task='text-generation')", "leave it out"),
    "repo_id checkpoint model_dir path": "write model_id=",
    (
        "endpoint_url inference_server_url provider server_kwargs base_url openai_api_base api_base host port "
        "organization openai_organization openai_proxy http_client http_async_client client_kwargs "
        "async_client_kwargs sync_client_kwargs default_headers headers default_query extra_headers service_tier "
        "store"
    ): _SERVER,
    "huggingfacehub_api_token hf_token use_auth_token api_key openai_api_key": _ACCESS,
    "streaming": "use .stream(prompt)",
    "stop_sequences": "write stop=, a list of strings",
    # Fields and call options of a chat model.
    "tools functions": (_NO_TOOLS, "give them to .bind_tools(tools)"),
    "function_call": (_NO_TOOLS, "write .bind_tools(tools, tool_choice='name')"),
    "tool_choice": (_NO_TOOLS, "give it to .bind_tools(tools, tool_choice='any')"),
    "parallel_tool_calls": (_NO_TOOLS, "give it to .bind_tools(tools, parallel_tool_calls=False)"),
    "constraint": (
        "an LLM takes a text and has no constraint; use ChatQuantizedHuggingFace",
        "it is an option of a call: .bind(constraint=...)",
    ),
    "strict": (
        "an LLM takes a text and has no strict; use ChatQuantizedHuggingFace",
        "it is an option of a call: .bind(strict=...)",
    ),
    (
        "response_format format grammar grammar_path guided_json guided_regex guided_choice guided_grammar "
        "guided_decoding_backend structured_outputs"
    ): (
        "an LLM returns any text; use ChatQuantizedHuggingFace and its with_structured_output(schema)",
        "use .with_structured_output(schema), or give constraint= at the call, of langchain_quantllm.structured",
    ),
    "chat_template template chat_format": (
        "an LLM takes the text as it is; ChatQuantizedHuggingFace has chat_template",
        "write chat_template=",
    ),
    "chat_template_kwargs reasoning reasoning_effort think enable_thinking": (
        "an LLM continues a text; ChatQuantizedHuggingFace has chat_template_kwargs",
        "write chat_template_kwargs={'enable_thinking': False}, or the variable that the model's template has",
    ),
    "tool_format": "an LLM takes a text and has no tools; use ChatQuantizedHuggingFace",
    "messages": (
        "an LLM takes a text; use ChatQuantizedHuggingFace for messages",
        "messages are the input of a call: .invoke(messages)",
    ),
    "prompt": ("it is the input of a call: .invoke(prompt)", "messages are the input of a call: .invoke(messages)"),
    "system system_prompt": (
        "put it into the prompt",
        "put it into the messages: [('system', '...'), ('human', '...')]",
    ),
    # LangChain's classes over servers, and OpenAI's API.
    "rate_limiter": "there is no request over a network; leave it out",
    "disable_streaming": "use .invoke(prompt), which does not stream",
    "extra_body vllm_kwargs llm_kwargs": "give what it holds by name",
    "user": "leave it out; the metadata of a call's config takes notes",
    "presence_penalty frequency_penalty": (
        "it subtracts from scores, and repetition_penalty= is another formula, which divides them: 1.0 changes "
        "nothing, 1.1 is usual, below 1 invites repetition; leave it out, or try repetition_penalty=1.1"
    ),
    "logit_bias": "write sequence_bias={(token_id,): 2.0}, whose keys are tuples of token ids",
    "max_completion_tokens max_output_tokens num_predict n_predict": "write max_new_tokens=",
    "best_of": "write n=, and choose among the completions yourself",
    "echo": ("write return_full_text=True", "a chat model returns messages; leave it out"),
    "suffix": "write the prompt that the model was trained with for filling in, and put the suffix there",
    "stream_options stream_usage": "streams report their usage anyway; leave it out",
    "request_timeout": "write timeout=, in seconds",
    "max_retries": (
        "there is no request over a network; leave it out",
        "write max_retries=, which is taken and does nothing: there is no request over a network; leave it out",
    ),
    "tiktoken_model_name": "tokens are counted by the model's own tokenizer; leave it out",
    # Ollama and llama.cpp.
    "model_path": "write model_id=, a folder or a repository's name; a .gguf file is converted first",
    "num_ctx n_ctx context_length context_window max_context_length max_model_len": (
        "the checkpoint says how long its context is and the KV cache grows by need; max_length= bounds prompt and "
        "completion together, kv_cache_memory= the cache"
    ),
    "num_gpu n_gpu_layers gpu_layers": (
        "the whole model goes onto one device; device=-1 is the CPU, device_map='auto' spreads it over several devices"
    ),
    "main_gpu": "write device='cuda:0'",
    "tensor_split": (
        "write device_map='auto', which spreads the layers over the GPUs; max_memory={0: '10GiB'} bounds each"
    ),
    "split_mode tensor_parallel_size pipeline_parallel_size device_ids": (
        "write device_map='auto', which spreads the layers over the GPUs"
    ),
    "num_thread n_threads threads": "call torch.set_num_threads, or set OMP_NUM_THREADS, before the model is loaded",
    "num_batch n_batch n_ubatch max_num_seqs max_num_batched_tokens": (
        "the engine batches by itself; batch_size= bounds how many sequences run at once"
    ),
    "use_mmap use_mlock": "weights are read from safetensors, which are mapped into memory anyway; leave it out",
    "low_vram": "write quantization='nf4', or device_map='auto'",
    "vocab_only": "leave it out",
    "f16_kv cache_type_k cache_type_v type_k type_v offload_kqv": (
        "write kv_cache_dtype=, 'auto' for the dtype of the model, 'fp8' or 'int8'; kv_cache_memory= bounds the cache"
    ),
    "logits_all": "write logprobs=True",
    "repeat_penalty": "write repetition_penalty=, the same formula over the whole text",
    "repeat_last_n last_n_tokens_size penalize_newline": "repetition_penalty= looks at the whole text; leave it out",
    "mirostat mirostat_mode mirostat_eta mirostat_tau": ("mirostat is not offered; min_p=0.05 has a similar effect"),
    "tfs_z top_a": "tail-free sampling is not offered; min_p=0.05 cuts the unlikely tail as well",
    "typical": "write typical_p=",
    "keep_alive": "the model stays in memory until .unload() or the last object that holds it goes; leave it out",
    "raw": ("an LLM takes the text as it is; leave it out", "use QuantizedHuggingFaceLLM, which uses no template"),
    "rope_freq_base rope_freq_scale rope_scaling": (
        "the checkpoint's config sets the rotary embedding; change rope_parameters in its config.json"
    ),
    "lora_path lora_base enable_lora max_loras lora peft_model_id": (
        "write adapters={'name': 'folder'} and adapter='name'"
    ),
    # vLLM.
    "gpu_memory_utilization": "write kv_cache_memory=0.5, the fraction of the free memory that the KV cache may take",
    "swap_space": "leave it out; requests wait where the KV cache is full",
    "block_size": "leave it out; the engine chooses it",
    "cpu_offload_gb": "write device_map='auto' with max_memory={0: '10GiB', 'cpu': '30GiB'}",
    "enforce_eager": "leave it out; graphs are used where they give the same, and engine_info says so",
    "enable_prefix_caching": "write prefix_caching=",
    "lora_request": "write adapter='name', one of adapters=",
    "download_dir": "write cache_dir=",
    "load_format": "write use_safetensors=",
    "use_beam_search beam_width": "write num_beams=",
    "stop_token_ids": "write eos_token_id=[...], which replaces the checkpoint's, so list these too",
    "min_tokens": "write min_new_tokens=",
    "prompt_logprobs": "only the completion's are reported: logprobs=",
    "include_stop_str_in_output": "stop strings are cut off; add them yourself",
    "bad_words": "write bad_words_ids=[[...]], lists of token ids",
    "allowed_token_ids": "it is not offered; suppress_tokens=[...] lists those that are not allowed",
    "truncate_prompt_tokens": "write truncation='left' with max_length=",
    # Other names for the same things.
    "device_id gpu": "write device=0",
    "use_gpu cuda": "a GPU is used where there is one; device=-1 is the CPU",
    "fp16 half": "write dtype='float16'",
    "bf16": "write dtype='bfloat16'",
    "precision": "write dtype='bfloat16', or quantization= for fewer bits",
    "adapter_name": "write adapter='name'",
}
"""Advice by names. Of two texts, the first is the LLM's and the second the chat model's."""

COUNTERPARTS: Mapping[str, str | tuple[str, str]] = {n: told for names, told in _ROWS.items() for n in names.split()}
"""Advice by name. A name of ours stands in it as `name=` or `.name(`."""

HARMLESS: Mapping[str, bool | int | str] = {
    **dict.fromkeys(("output_scores", "output_attentions", "output_hidden_states", "output_logits"), False),
    **dict.fromkeys(("return_tensors", "return_dict_in_generate", "clean_up_tokenization_spaces", "echo"), False),
    **dict.fromkeys(("presence_penalty", "frequency_penalty", "mirostat"), 0),
    **dict.fromkeys(("tfs_z", "best_of"), 1),
    "return_text": True,
    "prefix": "",
}
"""Values of these names that ask for nothing else than what is done anyway; they are taken without an error."""

_OWN_FORMAT = (
    "a checkpoint in this format says so in its own config, so leave quantization out for it; others are quantized "
    "while they load by 'nf4' (4 bits) or 'int8'."
)
_DTYPE = "it is a dtype: write quantization='none' with dtype={!r}."
_GGUF = "it is a kind of llama.cpp's GGUF files, whose counterpart here is {}."
_BITS = r"(bnb|bitsandbytes|loadin|llm|u?int|i|w)*"

SCHEME_COUNTERPARTS: Mapping[str, str] = {
    r"(i|t)?q[1-5]([01]|[a-z].*)?": _GGUF.format("'nf4' (4 bits)"),
    r"(i|t)?q[6-8]([01]|[a-z].*)?": _GGUF.format("'int8' (8 bits)"),
    r".*gg(uf|ml).*": "llama.cpp's GGUF files are converted first: langchain-quantllm convert FILE FOLDER.",
    r"(bf|bfloat)(16(bits?)?)?": _DTYPE.format("bfloat16"),
    r"((fp|f|float)?16(bits?)?|half|w16a16)": _DTYPE.format("float16"),
    r"((fp|f|float)?32(bits?)?)": _DTYPE.format("float32"),
    r"(auto|opt)?gptq.*|.*gptq": "write 'gptq', or GPTQ(bits=4) to make sure of the bits that the checkpoint has.",
    r"(qlora|nf4)(dq|d|doublequant)?|d(ouble)?q(uant)?(ization)?": "did you mean 'nf4-double'?",
    r"(bnb|bitsandbytes)": ("bitsandbytes makes 'int8' (8 bits), 'nf4' and 'fp4' (4 bits): write one of these names."),
    _BITS + r"4(bits?)?(bnb|bitsandbytes)?": "write 'nf4', the best of 4 bits here.",
    _BITS + r"8(bits?)?(bnb|bitsandbytes)?": "did you mean 'int8'?",
    _BITS + r"[\d.]+(bits?)?": (
        "there is no scheme of so many bits: 'nf4' has 4, 'int8' has 8, a GPTQ checkpoint 2, 3, 4 or 8."
    ),
    r"(auto)?awq.*": "write 'awq', or AWQ(group_size=128) to make sure of the groups that the checkpoint has.",
    r"aqlm|hqq|eetq|(optimum)?quanto|torchao|compressedtensors|.*fp8.*|.*(mx|nv)fp[468].*": _OWN_FORMAT,
    r"exl[23]|bitnet|spqr|vptq|higgs|quark|autoround|sinq|w\d+a\d+.*|modelopt|marlin|squeezellm|smoothquant|mlx": (
        _OWN_FORMAT
    ),
    r"true|yes|on|auto|default|best|quantized?": (
        "say which: 'nf4' (4 bits) or 'int8' (8 bits); None takes the checkpoint as it is."
    ),
    r"false|no|off|null|full|unquantized|original|": "write 'none' for weights as they are.",
}
"""Advice for values of `quantization` that name no scheme, by a pattern of the value in small letters, without dashes,
brackets and spaces; the first pattern that matches counts."""

_SECRET = re.compile(
    r"(.*_)?(key|token|secret|password|credentials?|auth|authorization|headers?|cookies?|proxy|proxies)"
)
_OURS = re.compile(r"(?<![\w(])([a-z]\w*)=")


def advice(name: str, kind: Kind) -> str | None:
    """Return what to do about an option name of another library; None if the name is unknown.

    Args:
        name: The name.
        kind: The kind of the class that got it.
    """
    told = COUNTERPARTS.get(name)
    return told[kind == "chat"] if isinstance(told, tuple) else told


def names_advised(text: str) -> list[str]:
    """List the options that an advice names, except those inside the brackets of a call."""
    return _OURS.findall(text)


def written(name: str, value: object) -> str:
    """Return an option with its value as a user would write it, but a secret as `...`."""
    # The address of a server may hold a password.
    is_secret = _SECRET.fullmatch(name.lower()) or COUNTERPARTS.get(name) in (_SERVER, _ACCESS)
    return f"{name}=..." if is_secret else f"{name}={value!r}"

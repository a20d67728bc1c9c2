"""Models whose weights an engine of others holds: fields, serialization, sharing, and what is not there."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from langchain_core.load import dumpd, dumps, load

from langchain_quantllm import NF4, ChatQuantizedHuggingFace, QuantizedHuggingFaceLLM, Server
from langchain_quantllm.errors import InvalidOptionError, UnsupportedError
from tests.support.checkpoints import make_checkpoint, make_tokenizer
from tests.support.external_servers import ScriptedServer

URL = "http://localhost:8000/v1"
KEY = "a-very-secret-key"


def make(**fields: Any) -> QuantizedHuggingFaceLLM:
    given = {"model_id": "acme/tiny", "engine": Server(URL, api_key=KEY, max_retries=5), **fields}
    return QuantizedHuggingFaceLLM(**given)


class TestFields:
    def test_urls_are_written_in_one_way(self) -> None:
        for url in ("http://localhost:8000", "http://localhost:8000/", f"{URL}/", f"{URL}/chat/completions"):
            assert Server(url) == Server(URL)
        assert Server("https://host/proxy/v1/").url == "https://host/proxy/v1"

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"url": ""}, "give the base"),
            ({"url": "localhost:8000"}, "must begin with http"),
            ({"url": "http://me:word@host/v1"}, "give a key as api_key="),
            ({"url": "http://host:port/v1"}, "is no URL"),
            ({"url": "http://\u2026/v1"}, "is no URL"),
            ({"url": "http://host/v1?a=b"}, "leave out"),
            ({"url": URL, "max_retries": -1}, "max_retries=-1"),
            ({"url": URL, "max_connections": 0}, "max_connections=0"),
            ({"url": URL, "read_timeout_s": 0}, "read_timeout_s=0"),
            ({"url": URL, "api_key": "a\nb"}, "api_key"),
            ({"base_url": URL}, "write url="),
            ({"url": URL, "retries": 3}, "max_retries"),
        ],
    )
    def test_wrong_options_say_what_is_right(self, options: dict[str, Any], words: str) -> None:
        with pytest.raises(InvalidOptionError, match=words) as error:
            Server(**options)
        assert "word@" not in str(error.value)

    @pytest.mark.parametrize(
        "field",
        [
            {"device_map": "auto"},
            {"device": -1},
            {"dtype": "float16"},
            {"batch_invariant": True},
            {"kv_cache_memory": "1GiB"},
            {"fuse": False},
            {"attn_implementation": "eager"},
            {"model_kwargs": {"rope_scaling": None}},
            {"num_beams": 4, "do_sample": False},
        ],
    )
    def test_fields_that_it_does_not_carry_out_are_refused_by_name(self, field: dict[str, Any]) -> None:
        with pytest.raises(InvalidOptionError, match=next(iter(field))):
            make(**field)

    @pytest.mark.parametrize("engine", ["vlm", 3, {"name": "serve"}, {"url": URL}, "server"])
    def test_what_is_no_engine_raises(self, engine: Any) -> None:
        with pytest.raises(InvalidOptionError, match="engine|url"):
            make(engine=engine)

    def test_the_key_of_a_server_is_no_token_of_the_hub(self) -> None:
        with pytest.raises(InvalidOptionError, match=r"Server\(\.\.\., api_key=\.\.\.\)"):
            ChatQuantizedHuggingFace(model="acme/tiny", engine=Server(URL), api_key=KEY)

    def test_a_chat_model_takes_the_engine_over(self) -> None:
        assert ChatQuantizedHuggingFace(llm=make()).engine == make().engine  # type: ignore[call-arg]

    def test_the_scheme_is_the_one_that_was_named(self) -> None:
        assert make(quantization="nf4").scheme == NF4()


class TestSerialization:
    def test_the_key_is_in_no_text_and_no_pickle(self) -> None:
        llm = make()
        for text in (repr(llm), str(llm), dumps(llm), repr(llm._identifying_params), str(llm.asdict())):
            assert KEY not in text
        assert KEY.encode() not in pickle.dumps(llm)

    def test_copies_keep_the_key_and_pickles_the_rest(self) -> None:
        llm = make()
        assert copy.deepcopy(llm).engine.api_key == KEY
        again = pickle.loads(pickle.dumps(llm))
        assert again.engine == Server(URL, max_retries=5)

    def test_dumps_have_the_dict_form_and_load_again(self) -> None:
        dumped = dumpd(make())
        assert dumped["kwargs"]["engine"] == {"name": "server", "url": URL, "max_retries": 5}
        loaded = load(dumped, allowed_objects=[QuantizedHuggingFaceLLM], valid_namespaces=["langchain_quantllm"])
        assert loaded.engine == Server(URL, max_retries=5)

    def test_the_key_of_caches_names_the_engine_and_not_the_address(self) -> None:
        own = QuantizedHuggingFaceLLM(model_id="acme/tiny")._identifying_params
        here, there = (make(engine=Server(url))._identifying_params for url in (URL, "http://other/v1"))
        assert here == there
        assert here != own
        assert here != make(engine=Server(URL, model="finetuned"))._identifying_params


@pytest.mark.enable_socket
class TestLoaded:
    @pytest.fixture
    def server(self) -> Iterator[ScriptedServer]:
        with ScriptedServer(tokenizer=make_tokenizer()) as made:
            yield made

    @pytest.fixture(scope="class")
    def folder(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        path = make_checkpoint(
            tmp_path_factory.mktemp("others") / "tiny", generation={"do_sample": True, "temperature": 0.5}
        )
        for file in path.glob("*.safetensors"):
            file.unlink()
        return path

    def test_equal_settings_share_one_engine(self, server: ScriptedServer, folder: Path) -> None:
        first, second, other = (
            make(model_id=str(folder), engine=Server(server.url, max_retries=n)).load() for n in (1, 1, 2)
        )
        assert first._engine() is second._engine()
        assert first._engine() is not other._engine()
        assert copy.deepcopy(first).load()._engine() is first._engine()
        first.unload()
        assert not second.is_loaded
        other.unload()

    def test_a_wrong_field_of_one_instance_stops_no_other(self, server: ScriptedServer, folder: Path) -> None:
        engine = Server(server.url)
        wrong, right = (make(model_id=str(folder), engine=engine) for _ in range(2))
        for field, value in (("engine", {"name": "serve"}), ("quantization", "nf5")):
            before = getattr(wrong, field)
            setattr(wrong, field, value)
            right.load()
            with pytest.raises(InvalidOptionError, match=field):
                wrong.load()
            setattr(wrong, field, before)
            right.unload()

    def test_another_engine_is_another_model(self, server: ScriptedServer, folder: Path) -> None:
        llm = make(model_id=str(folder), engine=Server(server.url)).load()
        assert llm.is_loaded
        llm.engine = {"name": "server", "url": server.url}
        assert llm.is_loaded
        llm.engine = "auto"
        assert not llm.is_loaded

    def test_what_is_not_here_says_where_it_is(self, server: ScriptedServer, folder: Path) -> None:
        llm = make(model_id=str(folder), engine=Server(server.url))
        with pytest.raises(UnsupportedError, match=f"weights are at the server {server.url}"):
            _ = llm.pipeline
        with pytest.raises(UnsupportedError, match="no memory of theirs can be measured here"):
            llm.memory_report()
        assert llm.engine_info.name == "server"
        assert llm.engine_info.version == "vllm"
        assert llm.get_num_tokens("The sea") == len(make_tokenizer().encode("The sea"))
        assert llm._options(None, {}).temperature == 0.5  # of the checkpoint's generation config
        assert "not in this process" in llm._get_ls_params()["memory"]  # type: ignore[typeddict-item]
        llm.unload()
        assert not llm.is_loaded

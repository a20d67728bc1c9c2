"""Commands and manifests of other engines' servers: they parse, and what those would refuse is refused first."""

from __future__ import annotations

import itertools
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from langchain_quantllm.cli import app
from langchain_quantllm.server.deployment import yaml_text
from tests.support.checkpoints import edit_json, make_checkpoint

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": True, "desc_act": False}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_checkpoint(tmp_path_factory.mktemp("deploy") / "My Model-GPTQ")
    edit_json(folder / "config.json", quantization_config=GPTQ)
    return folder


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "sql"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"r": 12, "rank_pattern": {"q_proj": 20}}))
    return folder


def deploy(*words: object) -> Result:
    return CliRunner().invoke(app, ["deploy", *map(str, words)])


def printed(*words: object) -> str:
    result = deploy(*words)
    assert result.exit_code == 0, result.stderr
    return result.stdout


def refusal(*words: object) -> str:
    result = deploy(*words)
    assert result.exit_code == 1
    assert result.stdout == ""
    return result.stderr


def options_in(words: list[str]) -> dict[str, str]:
    return {word: value for word, value in itertools.pairwise(words) if word.startswith("--")}


def test_the_command_serves_the_checkpoint_in_parts_and_copies(checkpoint: Path) -> None:
    text = printed(checkpoint, "--replicas", 4, "--tensor-parallel", 2, "--context", 128, "--name", "mine")
    words = shlex.split(text)
    assert words[:3] == ["vllm", "serve", str(checkpoint)]
    assert options_in(words) == {
        "--served-model-name": "mine",
        "--host": "127.0.0.1",
        "--port": "8000",
        "--data-parallel-size": "4",
        "--tensor-parallel-size": "2",
        "--max-model-len": "128",
    }
    assert text.count("\n") == 1


def test_adapters_are_models_of_their_names_with_room_for_their_rank(checkpoint: Path, adapter: Path) -> None:
    words = shlex.split(printed(checkpoint, "--name", "m", "--adapter", f"sql={adapter}", "--pipeline-parallel", 2))
    assert words[-2:] == ["--lora-modules", f"sql={adapter}"]
    found = options_in(words)
    assert (found["--max-loras"], found["--max-lora-rank"], found["--pipeline-parallel-size"]) == ("1", "32", "2")
    assert "--enable-lora" in words


def test_the_yaml_is_an_application_of_ray_serve(checkpoint: Path) -> None:
    words = ("--name", "m", "--replicas", 3, "--tensor-parallel", 2, "--context", 128)
    config = yaml.safe_load(printed(checkpoint, "--format", "ray", *words))
    assert config["http_options"] == {"host": "127.0.0.1", "port": 8000}  # Ray asks for no key
    [application] = config["applications"]
    assert (application["import_path"], application["route_prefix"]) == ("ray.serve.llm:build_openai_app", "/")
    assert application["args"]["llm_configs"] == [
        {
            "model_loading_config": {"model_id": "m", "model_source": str(checkpoint)},
            "engine_kwargs": {"tensor_parallel_size": 2, "pipeline_parallel_size": 1, "max_model_len": 128},
            "deployment_config": {"autoscaling_config": {"min_replicas": 3, "max_replicas": 3}},
        }
    ]


def test_the_manifest_is_a_deployment_and_its_service(checkpoint: Path, adapter: Path) -> None:
    words = ("--name", "Acme/My_Model", "--replicas", 2, "--tensor-parallel", 2, "--pipeline-parallel", 2)
    text = printed(checkpoint, "--format", "kubernetes", "--adapter", f"sql={adapter}", *words)
    deployment, service = yaml.safe_load_all(text)
    assert (deployment["kind"], service["kind"]) == ("Deployment", "Service")
    assert deployment["metadata"]["name"] == service["metadata"]["name"] == "acme-my-model"
    assert deployment["spec"]["replicas"] == 2
    pod = deployment["spec"]["template"]
    assert pod["metadata"]["labels"] == deployment["spec"]["selector"]["matchLabels"] == service["spec"]["selector"]
    [container] = pod["spec"]["containers"]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 4}
    assert container["command"] == ["vllm"]
    assert container["args"][:2] == ["serve", "/models/model"]
    assert container["args"][-1] == "sql=/models/adapters/sql"
    assert options_in(container["args"])["--host"] == "0.0.0.0"
    assert all(isinstance(word, str) for word in container["args"])
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"] == {"path": "/health", "port": 8000}
    assert container["env"][0]["valueFrom"]["secretKeyRef"]["optional"] is False  # a key for all who reach the pod
    assert {mount["name"] for mount in container["volumeMounts"]} == {v["name"] for v in pod["spec"]["volumes"]}
    assert service["spec"]["ports"] == [{"port": 8000, "targetPort": 8000}]


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quantize to GPTQ: langchain-quantllm quantize"),
        ({"load_in_8bit": True, "quant_method": "bitsandbytes"}, "with its plugin vllm-bnb-plugin only"),
        ({**GPTQ, "bits": 3}, "has 3 bits, symmetric"),
        ({**GPTQ, "sym": False}, "has 4 bits, asymmetric"),
        ({**GPTQ, "dynamic": {"-:.*gate": {}, ".*up": {"bits": 2}}}, "has 2 bits, symmetric"),
    ],
)
def test_what_vllm_does_not_read_is_refused(tmp_path: Path, config: Any, said: str) -> None:
    folder = make_checkpoint(tmp_path / "model")
    edit_json(folder / "config.json", quantization_config=config)
    assert said in " ".join(refusal(folder).split())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--tensor-parallel", 3), "--tensor-parallel 3 does not divide the model's 2 attention heads"),
        (("--pipeline-parallel", 5), "is more than the model's 2 layers"),
        (("--replicas", 0), "--replicas 0 is not allowed"),
        (("--context", 4096), "is more than the checkpoint's context of 256"),
        (("--engine", "sglang"), "--engine 'sglang' is not known; allowed are vllm."),
        (("--format", "kubernets"), "did you mean 'kubernetes'?"),
        (("--adapter", "sql"), "give NAME=FOLDER"),
        (("--adapter", "sql=/no/such"), "holds no LoRA adapter"),
        (("--name", "a b"), "--name 'a b' is not possible"),
    ],
)
def test_what_the_engine_would_refuse_is_refused_first(checkpoint: Path, words: tuple[Any, ...], said: str) -> None:
    assert said in " ".join(refusal(checkpoint, "--name", "m", *words).split())


def test_a_group_of_weights_is_not_cut(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model")
    edit_json(folder / "config.json", quantization_config={**GPTQ, "group_size": 128})
    assert "within groups of 128" in " ".join(refusal(folder, "--tensor-parallel", 2).split())


def test_ray_takes_no_adapters_of_folders(checkpoint: Path, adapter: Path) -> None:
    said = refusal(checkpoint, "--name", "m", "--format", "ray", "--adapter", f"sql={adapter}")
    assert "come from a bucket" in " ".join(said.split())


@pytest.mark.parametrize(
    "value",
    [
        {"a": "yes", "b": "1", "c": 1, "d": None, "e": True, "f": [], "g": {}, "on": "null"},
        {"a": ["x: y", "- z", "#", "", " ", "a\nb", "日本", '"', "x #y"]},
        {"a": [{"b": [[1, [2]], {"c": {"d": ["e"]}}]}], "/x/y.z": "a-b_c/d.e"},
    ],
)
def test_yaml_reads_back_as_what_was_written(value: Any) -> None:
    assert yaml.safe_load(yaml_text(value)) == value

from __future__ import annotations

import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from small_models import make_strategy, save_small_model
from small_runs import write_recipe

from fitune.recipes.errors import ModelError
from fitune.recipes.schema import ModelTable
from fitune.runtime.model.build import build_model
from fitune.runtime.model.models import (
    ModelSource,
    fetch_model,
    find_model_source,
    has_all_weights,
    has_local_tokenizer,
    is_hub_reachable,
    load_tokenizer,
)

SHA = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("llama"))


def find(id: str, folder: Path = Path("/nowhere"), **more: Any) -> ModelSource:
    return find_model_source(ModelTable(id=id, **more), lambda path: folder / path)


def test_a_folder_is_found_with_its_config_and_tokenizer(llama: Path) -> None:
    source = find(llama.name, llama.parent)
    assert (source.kind, source.folder, source.hub_id) == ("folder", llama, None)
    assert source.config["model_type"] == "llama"
    assert fetch_model(source) == llama
    assert has_local_tokenizer(source)
    assert load_tokenizer(source).decode(load_tokenizer(source)("feta")["input_ids"]) == "feta"


def test_a_path_goes_before_a_name_of_the_catalog(llama: Path, tmp_path: Path) -> None:
    assert find("llama-3.1-8b", tmp_path).kind == "catalog"
    shutil.copytree(llama, tmp_path / "llama-3.1-8b")
    assert find("llama-3.1-8b", tmp_path).kind == "folder"


def test_a_config_alone_can_be_planned_and_not_run(llama: Path) -> None:
    source = find("config.json", llama)
    assert source.kind == "config" and source.folder is None
    assert source.config_sha256 == find(".", llama).config_sha256
    for use in (fetch_model, load_tokenizer):
        with pytest.raises(ModelError, match=r"config\.json: a config\.json alone .*: give the model's folder"):
            use(source)


def test_the_digest_of_a_config_is_of_its_values_and_not_of_their_order(llama: Path) -> None:
    source = find(".", llama)
    turned = ModelSource(id=".", kind="folder", config=dict(reversed(source.config.items())))
    other = ModelSource(id=".", kind="folder", config={**source.config, "hidden_size": 65})
    assert turned.config_sha256 == source.config_sha256 != other.config_sha256


def test_a_folder_without_weights_is_refused(llama: Path, tmp_path: Path) -> None:
    shutil.copy(llama / "config.json", tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickled")
    with pytest.raises(ModelError, match=r"model\.id: .*: there are no weights \(\*\.safetensors\) in this folder"):
        fetch_model(find(".", tmp_path))


def test_a_folder_without_a_tokenizer_is_refused(llama: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(llama / name, tmp_path)
    source = find(".", tmp_path)
    assert not has_local_tokenizer(source)
    with pytest.raises(ModelError, match=r"its tokenizer cannot be loaded"):
        load_tokenizer(source)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no such file; a model's folder has a config.json"),
        (b"{", "not a readable JSON file"),
        (b"\xff\xfe", "not a readable JSON file"),
        (b"[" * 100_000, "not a readable JSON file"),
        (b"[1]", 'it has no "model_type"'),
        (b"{}", 'it has no "model_type"'),
        (b'{"model_type": 3}', 'it has no "model_type"'),
    ],
)
def test_a_folder_that_is_not_a_models_is_refused(tmp_path: Path, content: bytes | None, said: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ModelError) as refused:
        find(".", tmp_path)
    assert said in str(refused.value) and str(tmp_path) in str(refused.value)


@pytest.mark.parametrize("id", ["./gone", "../gone", "/gone", "gone/config.json", "~/gone-from-here"])
def test_a_path_that_is_not_there_is_said_to_be_a_path(tmp_path: Path, id: str) -> None:
    with pytest.raises(ModelError, match=rf"model\.id: {id}: there is no such folder or config\.json"):
        find(id, tmp_path)


@pytest.mark.parametrize("id", ["llama-3.1-8", "smollm2-135m-instruc"])
def test_a_misspelt_name_gets_the_nearest_of_the_catalog(id: str) -> None:
    with pytest.raises(
        ModelError, match=r"not a hub id \(owner/name\); did you mean \"?(llama-3.1-8b|smollm2-135m-inst)"
    ):
        find(id)


@pytest.mark.parametrize(
    "quantization",
    [
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "awq", "bits": 4},
        {"quant_method": "fp8"},
        {"quant_method": "mxfp4"},
        {"load_in_8bit": True, "quant_method": "bitsandbytes"},
    ],
)
def test_a_checkpoint_that_is_quantised_for_inference_is_refused_with_what_to_use(
    llama: Path, tmp_path: Path, quantization: dict[str, Any]
) -> None:
    config = json.loads((llama / "config.json").read_text()) | {"quantization_config": quantization}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"stored quantised .* cannot be trained; use the original .*qlora"):
        find(".", tmp_path)


def test_an_architecture_that_transformers_does_not_know_is_refused(llama: Path, tmp_path: Path) -> None:
    shutil.copytree(llama, tmp_path, dirs_exist_ok=True)
    config = json.loads((llama / "config.json").read_text()) | {"model_type": "feta"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"(?s)transformers cannot load it.*feta"):
        build_model(fetch_model(find(".", tmp_path)), make_strategy(), torch_device())


def torch_device() -> Any:
    import torch

    return torch.device("cpu")


class Hub(http.server.ThreadingHTTPServer):
    """As much of the Hugging Face hub as a download needs, on this machine, and its refusals."""

    def __init__(self, model: Path) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.files = {one.name: one.read_bytes() for one in model.iterdir() if one.is_file()}
        self.asked: list[str] = []
        self.size_bytes: int | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class HubHandler(http.server.BaseHTTPRequestHandler):
    """`/cheese/feta` is a model; `/cheese/gated` and the like answer with the hub's error of that name."""

    server: Hub
    errors: ClassVar = {"gated": (403, "GatedRepo"), "gone": (401, "RepoNotFound"), "old": (404, "RevisionNotFound")}

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.server.asked.append(path)
        name = next((one for one in self.errors if f"cheese/{one}" in path), None)
        file = self.server.files.get(path.rpartition("/")[2])
        if name is not None:
            status, code = self.errors[name]
            self.answer(status, b"no", {"X-Error-Code": code, "X-Error-Message": "no"})
        elif path.startswith("/api/models/cheese/feta"):
            self.answer(200, json.dumps(self.describe()).encode(), {"Content-Type": "application/json"})
        elif file is None:
            self.answer(404, b"no", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": SHA})
        else:
            self.answer(200, file, {"ETag": f'"{len(file):040x}"', "X-Repo-Commit": SHA})

    def describe(self) -> Any:
        files = self.server.files.items()
        if "/tree/" in self.path:
            return [{"type": "file", "path": name, "size": len(one), "oid": SHA} for name, one in files]
        sizes = {name: self.server.size_bytes or len(one) for name, one in files}
        siblings = [{"rfilename": name, "size": size, "blobId": SHA} for name, size in sizes.items()]
        return {"_id": "1", "id": "cheese/feta", "modelId": "cheese/feta", "sha": SHA, "siblings": siblings}

    def answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


def test_a_snapshot_is_complete_when_every_part_of_the_weights_is_there(tmp_path: Path) -> None:
    parts = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    (tmp_path / "config.json").write_text("{}")
    assert not has_all_weights(tmp_path)
    (tmp_path / parts[0]).write_bytes(b"feta")
    assert not has_all_weights(tmp_path)
    index = {"weight_map": {"a": parts[0], "b": parts[1], "c": parts[0]}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert not has_all_weights(tmp_path)
    (tmp_path / parts[1]).write_bytes(b"feta")
    assert has_all_weights(tmp_path)


@pytest.fixture
def hub(llama: Path) -> Iterator[Hub]:
    with Hub(llama) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def ask(id: str, folder: Path, url: str, *, source: str = "fetch_model", **environment: str) -> str:
    """What a process says that finds a model on the hub and fetches it: `FETCHED folder` or the error's message."""
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from fitune.recipes.errors import ModelError\nfrom fitune.recipes.schema import ModelTable\n"
        f"from fitune.runtime.model.models import *\n"
        "try:\n"
        f"    print('FETCHED', {source}(find_model_source(ModelTable(**{{'id': sys.argv[1]}}), Path)))\n"
        "except ModelError as error:\n    print(error)\n"
    )
    variables = {name: one for name, one in os.environ.items() if not name.startswith("HF_")}
    variables |= {"HF_ENDPOINT": url, "HF_HOME": str(folder / "hub"), "HF_HUB_DISABLE_XET": "1"} | environment
    done = subprocess.run(
        [sys.executable, "-c", code, id], env=variables, cwd=folder, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_hub_model_is_downloaded_once_and_found_offline_afterwards(hub: Hub, tmp_path: Path, llama: Path) -> None:
    said = ask("cheese/feta", tmp_path, hub.url)
    assert said.startswith("FETCHED ")
    folder = Path(said.removeprefix("FETCHED "))
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert (folder / name).read_bytes() == (llama / name).read_bytes()
    asked = len(hub.asked)
    assert ask("cheese/feta", tmp_path, hub.url, HF_HUB_OFFLINE="1") == said
    assert len(hub.asked) == asked


def test_a_download_leaves_out_what_a_run_does_not_need(hub: Hub, tmp_path: Path) -> None:
    useless = ("consolidated.safetensors", "pytorch_model.bin", "photo.png")
    hub.files |= dict.fromkeys(useless, b"large")
    folder = Path(ask("cheese/feta", tmp_path, hub.url).removeprefix("FETCHED "))
    assert (folder / "model.safetensors").is_file()
    assert not any((folder / name).exists() for name in useless)


def test_a_hub_model_without_safetensors_is_refused(hub: Hub, tmp_path: Path) -> None:
    hub.files["pytorch_model.bin"] = hub.files.pop("model.safetensors")
    assert (
        ask("cheese/feta", tmp_path, hub.url) == "model.id: cheese/feta: the hub has no weights of it as *.safetensors"
    )


def test_a_tokenizer_comes_without_the_weights(hub: Hub, tmp_path: Path) -> None:
    assert ask("cheese/feta", tmp_path, hub.url, source="load_tokenizer").startswith("FETCHED ")
    assert not any("safetensors" in one for one in hub.asked)


def test_a_model_that_does_not_fit_the_disk_is_not_downloaded(hub: Hub, tmp_path: Path) -> None:
    hub.size_bytes = 10**15
    assert "its weights are 909.5 TiB, and" in ask("cheese/feta", tmp_path, hub.url)
    assert not any("safetensors" in one for one in hub.asked)


@pytest.mark.parametrize(
    ("id", "said"),
    [
        ("cheese/gated", "the hub gates this model: accept its licence on its page, then `hf auth login`"),
        ("cheese/gone", "the hub has no such model, or it is private and needs a token (HF_TOKEN)"),
        ("cheese/old", "the hub has no such model"),
        ("cheese/--feta--", "the hub has no such model"),
        ("cheese/empty", "the hub has no config.json for it; fitune needs a transformers checkpoint"),
    ],
)
def test_a_refusal_of_the_hub_is_one_message(hub: Hub, tmp_path: Path, id: str, said: str) -> None:
    hub.files = {}
    message = ask(id, tmp_path, hub.url)
    assert message.startswith(f"model.id: {id}: ") and said in message and "\n" not in message


@pytest.mark.parametrize(
    ("environment", "said", "id"),
    [
        ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set", "llama-3.1-8b"),
        ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set", "cheese/feta"),
        ({}, "the hub cannot be reached", "llama-3.1-8b"),
        pytest.param({}, "the hub cannot be reached", "cheese/feta", marks=pytest.mark.slow),
    ],
)
def test_a_hub_that_cannot_be_reached_is_said(tmp_path: Path, environment: dict[str, str], said: str, id: str) -> None:
    """A catalog model's config ships with fitune: its weights are what cannot be had."""
    message = ask(id, tmp_path, "http://127.0.0.1:9", **environment)
    assert said in message and "give model.id a local folder" in message and "\n" not in message


def test_the_command_line_says_what_is_wrong_with_the_model_in_one_message(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, "cheese/feta")
    variables = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    done = subprocess.run(
        [sys.executable, "-m", "fitune.runtime.cli", "run", str(recipe)],
        env=variables,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 1
    assert "error: model.id: cheese/feta: HF_HUB_OFFLINE is set" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_the_hub_is_reachable_where_it_answers_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        assert is_hub_reachable()
    assert not is_hub_reachable()


def test_an_unreachable_hub_is_not_asked_again_and_again_behind_a_proxy(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text('[model]\nid = "cheese/feta"\n[data]\ntrain = "rows.jsonl"\n')
    proxy = "http://127.0.0.1:9"
    nowhere = {"https_proxy": proxy, "HTTPS_PROXY": proxy, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    program = (
        "import sys, time; from fitune.runtime.cli import main\n"
        "sys.argv = ['fitune', 'plan', '--quick', 'recipe.toml']\n"
        "waits = []; time.sleep = waits.append\n"
        "try: main()\n"
        "finally: sys.exit(f'waited {waits}')"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | nowhere, capture_output=True, text=True, check=False)
    assert "the hub cannot be reached" in done.stderr
    assert "waited []" in done.stderr

"""Finds the model that a recipe names, without torch; fetches its weights only when asked to.

`model.id` is tried in this order: an existing folder or config.json, a name of fitune's catalog, a hub id.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from ...planner.catalog import find_model, list_models
from ...planner.shape import find_untrainable_quantization
from ...recipes.errors import ModelError
from ...recipes.problems import find_nearest
from ...recipes.schema import ModelTable
from ...recipes.units import format_bytes
from .embedded import EMBEDDED_MODEL, find_embedded_model, load_embedded_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")

HUB_SECONDS = 2
"""How long the hub's host may take to answer before the model is looked for in the local cache alone."""
WEIGHT_FILES = ("*.safetensors",)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
DOWNLOADED = (".json", ".safetensors", ".jinja", ".model", ".txt", ".tiktoken", ".py")
"""Endings of a hub repository's files that a run needs."""
SECOND_COPIES = ("consolidated",)
"""How files begin that hold the same weights once more, in the form of the model's makers."""


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """Where a model comes from.

    id:       as the recipe writes it
    kind:     folder, config (a config.json: planning only), catalog, embedded or hub
    config:   the values of its config.json
    folder:   where its files are, None until they are fetched
    hub_id:   its name on the hub, None for a local one
    revision: of the hub's repository
    gated:    whether the hub asks for a token and an accepted licence
    """

    id: str
    kind: Literal["folder", "config", "catalog", "embedded", "hub"]
    config: Mapping[str, Any]
    folder: Path | None = None
    hub_id: str | None = None
    revision: str | None = None
    gated: bool = False

    @property
    def config_sha256(self) -> str:
        """Digest of the canonical JSON of the config: a plan made for another one is stale."""
        text = json.dumps(self.config, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


def find_model_source(table: ModelTable, resolve: Callable[[str], Path]) -> ModelSource:
    """The model of a recipe's [model] table; ModelError where there is none or it cannot be trained."""
    source = _find_local(table, resolve) or _find_in_catalog(table) or _find_on_hub(table)
    untrainable = find_untrainable_quantization(source.config)
    if untrainable is not None:
        raise ModelError(f"model.id: {table.id}: {untrainable}")
    return source


def _find_local(table: ModelTable, resolve: Callable[[str], Path]) -> ModelSource | None:
    path = resolve(table.id)
    if path.is_dir():
        return ModelSource(id=table.id, kind="folder", config=read_config(path / "config.json"), folder=path)
    if path.is_file():
        return ModelSource(id=table.id, kind="config", config=read_config(path))
    if table.id.startswith(("/", "./", "../", "~")) or table.id.endswith(".json"):
        raise ModelError(f"model.id: {table.id}: there is no such folder or config.json ({path})")
    return None


def _find_in_catalog(table: ModelTable) -> ModelSource | None:
    entry = find_model(table.id)
    if entry is None:
        return None
    if entry.name == EMBEDDED_MODEL and table.revision is None:
        return ModelSource(id=table.id, kind="embedded", config=entry.config, folder=find_embedded_model())
    return ModelSource(
        id=table.id,
        kind="catalog",
        config=entry.config,
        hub_id=entry.hub_id,
        revision=table.revision,
        gated=entry.gated,
    )


def _find_on_hub(table: ModelTable) -> ModelSource:
    if table.id.count("/") != 1 or " " in table.id:
        hint = find_nearest(table.id, [model.name for model in list_models()])
        raise ModelError(
            f"model.id: {table.id}: not a folder, not a config.json, not in fitune's catalog and not a hub id "
            f"(owner/name)" + (f"; did you mean {hint}?" if hint else "")
        )
    from huggingface_hub import hf_hub_download

    local = not is_hub_reachable()
    path = _ask_hub(
        table.id,
        table.revision,
        lambda: hf_hub_download(table.id, "config.json", revision=table.revision, local_files_only=local),
    )
    return ModelSource(
        id=table.id, kind="hub", config=read_config(Path(path)), hub_id=table.id, revision=table.revision
    )


def read_config(path: Path) -> dict[str, Any]:
    """A config.json; ModelError where it is missing, not JSON or has no model_type."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"model.id: {path}: no such file; a model's folder has a config.json") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ModelError(f"model.id: {path}: not a readable JSON file: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ModelError(f'model.id: {path}: not a model\'s config.json: it has no "model_type"')
    return config


def fetch_model(source: ModelSource) -> Path:
    """The local folder with the model's weights, downloaded or converted on first use; free disk is checked first."""
    if source.kind == "config":
        raise ModelError(f"model.id: {source.id}: a config.json alone can be planned, not run: give the model's folder")
    if source.kind == "embedded":
        return load_embedded_model()
    if source.folder is not None:
        if not any(True for pattern in WEIGHT_FILES for _ in source.folder.glob(pattern)):
            raise ModelError(f"model.id: {source.folder}: there are no weights (*.safetensors) in this folder")
        return source.folder
    return _download(source)


def has_local_tokenizer(source: ModelSource) -> bool:
    """Whether the model's tokenizer is on this machine."""
    folder = find_embedded_model() if source.kind == "embedded" else source.folder
    return folder is not None and any((folder / name).exists() for name in TOKENIZER_FILES)


def load_tokenizer(source: ModelSource, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The model's tokenizer; of a hub model its small files are fetched, not the weights."""
    from transformers import AutoTokenizer

    from ..quiet import quiet_libraries

    where: str | Path
    if source.kind == "config":
        raise ModelError(f"model.id: {source.id}: a config.json alone has no tokenizer: give the model's folder")
    if source.kind == "embedded":
        where = load_embedded_model()
    else:
        where = source.folder if source.folder is not None else str(source.hub_id)

    def load() -> Any:
        with quiet_libraries():
            return AutoTokenizer.from_pretrained(where, revision=source.revision, trust_remote_code=trust_remote_code)

    if source.hub_id is not None:
        return _ask_hub(source.hub_id, source.revision, load)  # type: ignore[no-any-return]
    try:
        return load()  # type: ignore[no-any-return]
    except (OSError, ValueError, KeyError, ImportError, TypeError) as error:
        raise ModelError(f"model.id: {where}: its tokenizer cannot be loaded: {error}") from error


def _download(source: ModelSource) -> Path:
    from huggingface_hub import HfApi, snapshot_download

    assert source.hub_id is not None, "a catalog or hub source has a hub id"
    hub_id, revision = source.hub_id, source.revision

    def download() -> str:
        try:
            cached = snapshot_download(hub_id, revision=revision, local_files_only=True)
        except OSError:
            cached = None
        if cached is not None and has_all_weights(Path(cached)):
            return cached
        files = HfApi().model_info(hub_id, revision=revision, files_metadata=True).siblings or []
        sizes = {one.rfilename: one.size or 0 for one in files if _is_needed(one.rfilename)}
        weights = [size for name, size in sizes.items() if name.endswith(".safetensors")]
        if not weights:
            raise ModelError(f"model.id: {hub_id}: the hub has no weights of it as *.safetensors")
        _check_disk(hub_id, sum(weights))
        return snapshot_download(hub_id, revision=revision, allow_patterns=list(sizes))

    return Path(_ask_hub(hub_id, revision, download))


def measure_tokenizer_bytes(folder: Path | None) -> int | None:
    """Size of the tokenizer's files in a model's folder; None where it has none."""
    return None if folder is None else _sum_sizes(folder / name for name in TOKENIZER_FILES)


def measure_stored_bytes(folder: Path | None) -> int | None:
    """Size of the weight files in a model's folder; None where it has none."""
    return None if folder is None else _sum_sizes(one for kind in WEIGHT_FILES for one in folder.glob(kind))


def _sum_sizes(paths: Iterable[Path]) -> int | None:
    return sum(path.stat().st_size for path in paths if path.is_file()) or None


def has_all_weights(folder: Path) -> bool:
    """Whether every file of the model's weights is in a snapshot: one that only holds a config.json is there too."""
    try:
        index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return (folder / "model.safetensors").is_file()
    return all((folder / name).is_file() for name in index["weight_map"].values())


def _is_needed(name: str) -> bool:
    return "/" not in name and name.endswith(DOWNLOADED) and not name.startswith(SECOND_COPIES)


def _check_disk(hub_id: str, needed_bytes: int) -> None:
    from huggingface_hub.constants import HF_HUB_CACHE

    folder = Path(HF_HUB_CACHE)
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise ModelError(
            f"model.id: {hub_id}: its weights are {format_bytes(needed_bytes)}, and {folder} has {format_bytes(free)} "
            "free; set HF_HOME to a larger disk"
        )


def is_hub_reachable() -> bool:
    """Whether the hub answers one request, through a proxy where one is set; a download would try again and again for
    half a minute."""
    from huggingface_hub import constants, errors, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS)
    except (OSError, errors.HTTPError, errors.OfflineModeIsEnabled):  # type: ignore[attr-defined]
        return False
    return True


def _ask_hub(hub_id: str, revision: str | None, question: Callable[[], T]) -> T:
    """Run a question to the hub; its many errors become one ModelError that says what to do."""
    from huggingface_hub import errors

    where = f"model.id: {hub_id}" + (f" at revision {revision}" if revision else "")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it tells of every retry
    try:
        return question()
    except errors.GatedRepoError as error:
        raise ModelError(
            f"{where}: the hub gates this model: accept its licence on its page, then `hf auth login` "
            "(or set HF_TOKEN) with a token that may read it"
        ) from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError) as error:
        raise ModelError(
            f"{where}: the hub has no such model, or it is private and needs a token (HF_TOKEN)"
        ) from error
    except errors.EntryNotFoundError as error:
        if isinstance(error, errors.LocalEntryNotFoundError):
            raise ModelError(_unreachable(where)) from error
        raise ModelError(
            f"{where}: the hub has no config.json for it; fitune needs a transformers checkpoint"
        ) from error
    # HTTPError is the root of the HTTP client's errors, whichever client the hub's library uses.
    except (OSError, errors.HTTPError, errors.OfflineModeIsEnabled) as error:  # type: ignore[attr-defined]
        raise ModelError(f"{_unreachable(where)} ({type(error).__name__})") from error


def _unreachable(where: str) -> str:
    offline = os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")
    reason = "HF_HUB_OFFLINE is set" if offline else "the hub cannot be reached"
    return f"{where}: {reason} and the model is not in the local cache; give model.id a local folder, or connect"

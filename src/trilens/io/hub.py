"""From a path or hub id to a local directory that holds the checkpoint's files.

The hub is asked through `huggingface_hub`, which honours HF_HOME, HF_HUB_OFFLINE and HF_TOKEN. Only
files that a load needs are fetched, pickled weights never.
"""

from __future__ import annotations

import glob
import os
import re
from pathlib import Path

from huggingface_hub import HfApi, is_offline_mode, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from trilens.errors import (
    ConfigError,
    CorruptFileError,
    LoadError,
    ModelNotFoundError,
    OfflineError,
    UnsafeFormatError,
    UsageError,
)
from trilens.io.messages import clip, reason
from trilens.io.side_files import check_side_files
from trilens.io.weight_files import (
    INDEX_NAME,
    SINGLE_NAME,
    explicit_name,
    gguf_way,
    refusal,
    shard_names,
    weight_files,
)

__all__ = ["file_refusal", "local_folder"]

# One short question decides whether the hub can be reached; downloads keep the client's own,
# longer limits.
_PROBE_TIMEOUT_S = 5.0

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_PICKLED_FILE = re.compile(r"\.(bin|pt|pth|ckpt|pkl|pickle)$", re.IGNORECASE)
_SIDE_FILE = re.compile(r"[^/]+\.(json|txt|model|tiktoken|jinja|vocab|bpe|spm)$")


def local_folder(
    path_or_hub_id: str | os.PathLike[str], *, revision: str | None, code: bool
) -> tuple[Path, str]:
    """Find the directory of a checkpoint; fetch it from the hub when it is a hub id.

    Args:
        path_or_hub_id: an existing directory, or a hub id such as "gpt2" or "owner/name".
        revision: branch, tag or commit of the hub's repository; None is the default branch.
        code: fetch the repository's Python files too.

    Returns:
        The directory, and what to call it in messages: the absolute path or the hub id.

    Raises:
        ModelNotFoundError: there is no such directory, hub id or revision, or no access to it.
        OfflineError: the hub cannot be reached and its cache does not hold the model.
        UnsafeFormatError: the place has only pickled weights.
        CorruptFileError: a small file that is none, or a link that leads out of the checkpoint.
        LoadError: the path is a file.
        UsageError: not a path at all, or a revision for a local directory.
    """
    if not isinstance(path_or_hub_id, str | os.PathLike) or not str(path_or_hub_id).strip():
        raise UsageError(
            f"path_or_hub_id is {path_or_hub_id!r}: give a directory or a hub id such as 'gpt2'"
        )
    text = os.fspath(path_or_hub_id)
    if not isinstance(text, str):
        raise UsageError(f"path_or_hub_id is {text!r}: give text, not bytes")
    if "\0" in text:
        raise ModelNotFoundError(
            f"path {clip(text, 300)} holds a zero byte: no file system has such a path"
        )
    if revision is not None and not (isinstance(revision, str) and revision):
        raise UsageError(f"revision is {revision!r}: give a branch, tag or commit, or None")
    try:
        path = Path(text).expanduser()
        found_directory, found_file = path.is_dir(), path.is_file()
    except (OSError, RuntimeError) as cause:
        raise ModelNotFoundError(
            f"path {clip(text, 300)} cannot be read: {reason(cause)}"
        ) from cause
    if found_directory:
        if revision is not None:
            raise UsageError(
                f"revision {revision!r} means nothing for the local directory {text}: leave it out"
            )
        check_side_files(path.resolve())
        return path.resolve(), str(path.resolve())
    if found_file:
        raise file_refusal(path)
    if not isinstance(path_or_hub_id, str) or not _is_hub_id(text):
        raise ModelNotFoundError(
            f"directory {clip(text, 300)} does not exist: give a directory with config.json, or a "
            "hub id"
        )
    folder = _from_hub(text, revision=revision, code=code)
    check_side_files(folder)
    return folder, text


def _is_hub_id(text: str) -> bool:
    parts = text.split("/")
    return (
        _HUB_ID.fullmatch(text) is not None
        and len(text) <= 96
        and ".." not in text
        and "--" not in text
        and not any(part.endswith((".", "-", ".git")) for part in parts)
    )


def file_refusal(path: Path) -> LoadError:
    """The error of a file where the directory of a checkpoint is needed."""
    if _PICKLED_FILE.search(path.name):
        return UnsafeFormatError(
            f"{path} is a file of pickled weights, which can run code when opened: convert "
            f"published RWKV-7 weights with trilens convert {path} -o DIR, others with "
            "safetensors, then give the directory that holds config.json"
        )
    if path.suffix.lower() == ".gguf":
        return LoadError(f"{path} is a file: {gguf_way(str(path.parent), path.name)}")
    return LoadError(f"{path} is a file: give the directory that holds it and config.json")


def _from_hub(hub_id: str, *, revision: str | None, code: bool) -> Path:
    names, cause = _ask_hub(hub_id, revision)
    if names is None:
        return _from_cache(hub_id, revision, cause)
    if "config.json" not in names:
        raise ConfigError(f"hub model {hub_id} has no config.json: give a transformers model")
    side = [name for name in names if _SIDE_FILE.fullmatch(name) or (code and name.endswith(".py"))]
    folder = _download(hub_id, revision, side)
    # The directory's name is the commit, so that the weights come from the same one.
    return _download(hub_id, folder.name, _wanted_weights(hub_id, folder, names))


def _wanted_weights(hub_id: str, folder: Path, names: list[str]) -> list[str]:
    """The weight files to fetch: those that a load reads, not each copy in another format."""
    explicit = explicit_name(folder)
    index = explicit or INDEX_NAME
    if explicit is not None and not explicit.endswith(".json"):
        return [explicit]
    if explicit is None and SINGLE_NAME in names:
        return [SINGLE_NAME]
    if index in names:
        return list(shard_names(folder / index))
    raise refusal(f"hub model {hub_id}", [name for name in names if "/" not in name])


def _ask_hub(hub_id: str, revision: str | None) -> tuple[list[str] | None, Exception | None]:
    """The repository's file names; None, with the cause, when the hub does not answer."""
    if is_offline_mode():
        return None, None
    try:
        info = HfApi().model_info(hub_id, revision=revision, timeout=_PROBE_TIMEOUT_S)
    except (RepositoryNotFoundError, RevisionNotFoundError) as cause:
        raise _not_found(hub_id, revision, cause) from cause
    except HfHubHTTPError as cause:
        if getattr(cause.response, "status_code", None) in {401, 403}:
            raise ModelNotFoundError(
                f"hub model {hub_id} may not be read: set HF_TOKEN to a valid token of an account "
                f"that has access ({reason(cause)})"
            ) from cause
        return None, cause
    except Exception as cause:  # noqa: BLE001
        # The HTTP client's errors have no public root here; each of them means "no answer".
        return None, cause
    return [sibling.rfilename for sibling in info.siblings or []], None


def _not_found(hub_id: str, revision: str | None, cause: Exception) -> ModelNotFoundError:
    if isinstance(cause, GatedRepoError):
        return ModelNotFoundError(
            f"hub model {hub_id} is gated: accept its terms on its page, then set HF_TOKEN to a "
            "token of that account"
        )
    if isinstance(cause, RevisionNotFoundError):
        return ModelNotFoundError(
            f"hub model {hub_id} has no revision {revision!r}: give a branch, tag or commit that "
            "its page lists"
        )
    return ModelNotFoundError(
        f"hub model {hub_id} is not found, and no directory {hub_id} exists: check the spelling; "
        "for a private model set HF_TOKEN"
    )


def _download(hub_id: str, revision: str | None, names: list[str]) -> Path:
    patterns = [glob.escape(name) for name in names]
    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=patterns))
    except (RepositoryNotFoundError, RevisionNotFoundError) as cause:
        raise _not_found(hub_id, revision, cause) from cause
    except LocalEntryNotFoundError as cause:
        raise _offline(hub_id, revision, cause) from cause
    except HfHubHTTPError as cause:
        raise LoadError(f"hub model {hub_id} could not be fetched: {reason(cause)}") from cause
    except OSError as cause:
        raise LoadError(f"hub model {hub_id} could not be stored: {reason(cause)}") from cause
    except Exception as cause:
        raise OfflineError(
            f"the download of hub model {hub_id} broke off ({reason(cause)}): it resumes "
            "when run again"
        ) from cause


def _from_cache(hub_id: str, revision: str | None, cause: Exception | None) -> Path:
    try:
        folder = Path(
            snapshot_download(
                hub_id, revision=revision, allow_patterns=["config.json"], local_files_only=True
            )
        )
    except (OSError, LookupError, ValueError) as error:
        raise _offline(hub_id, revision, cause) from (cause or error)
    if (folder / "config.json").is_file():
        try:
            weight_files(folder)
        except UnsafeFormatError:
            raise
        except CorruptFileError as error:
            raise OfflineError(
                f"the cached copy of hub model {hub_id} is incomplete ({error}), and the hub "
                "cannot be reached"
            ) from error
        except LoadError as error:
            raise _offline(hub_id, revision, cause) from error
        return folder
    raise _offline(hub_id, revision, cause)


def _offline(hub_id: str, revision: str | None, cause: Exception | None) -> OfflineError:
    at = f" at revision {revision!r}" if revision is not None else ""
    why = "HF_HUB_OFFLINE is set" if cause is None else reason(cause)
    return OfflineError(
        f"the hub cannot be reached ({why}) and model {hub_id}{at} is not in its cache, and no "
        f"directory {hub_id} exists: connect, or give a local directory"
    )

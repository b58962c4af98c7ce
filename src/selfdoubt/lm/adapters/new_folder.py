"""Writes a folder as a whole or not at all, and uploads folders to the hub."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from selfdoubt import storage
from selfdoubt.errors import ConfigError, SelfdoubtError, UploadError, require

#: File that marks an exported folder, so that exporting again may replace it.
MARK = "selfdoubt-export.json"


@contextmanager
def new_folder(
    out: str | os.PathLike[str], about: Mapping[str, Any], sources: tuple[str | os.PathLike[str], ...] = ()
) -> Iterator[Path]:
    """Yield a new folder next to ``out`` that replaces it when the block ends, or is removed after an error.

    Args:
        out: Folder to write: missing, empty, or exported before.
        about: Content of ``selfdoubt-export.json``.
        sources: Names or folders that are read in the block: they must not lie in ``out``.

    Raises:
        ConfigError: If ``out`` holds something else, or cannot be written.
    """
    out = Path(out).expanduser().resolve()
    check_free(out, sources)
    new = out.with_name(f".{out.name}.{os.getpid()}.part")
    old = out.with_name(f".{out.name}.{os.getpid()}.old")
    try:
        new.mkdir(parents=True)
        yield new
        text = json.dumps(dict(about), indent=2) + "\n"
        storage.write_file(new / MARK, text.encode())
        if out.exists():
            out.rename(old)
        new.rename(out)
    except SelfdoubtError:
        raise
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"{out} cannot be written ({getattr(error, 'strerror', None) or error}); give a folder on a disk with room"
        ) from error
    finally:
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def check_free(out: Path, sources: tuple[str | os.PathLike[str], ...] = ()) -> None:
    """Check that a folder is missing, empty, or exported before, and holds none of the sources.

    Raises:
        ConfigError: If it holds something else, or one of the sources.
    """
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file, and a folder is to be written there; give another name")
    if out.is_dir() and any(out.iterdir()) and not (out / MARK).is_file():
        raise ConfigError(
            f"{out} is not empty, and nothing exported it: it has no {MARK}; give a new folder, or empty this one"
        )
    for source in sources:
        path = Path(source).expanduser()
        if path.exists() and out in (path.resolve(), *path.resolve().parents):
            raise ConfigError(f"{out} holds {source}, which is read to write it; give another folder")


def check_upload(name: str) -> None:
    """Check name and token of an upload, before long work that ends with it.

    Raises:
        ConfigError: If the name is not ``user/name``, or a token is missing.
    """
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        raise ConfigError(f"a name on the hub looks like user/name, got {name!r}")
    if require("huggingface_hub", "lm").get_token() is None:
        raise ConfigError(
            "uploading needs a token: set HF_TOKEN to one that may write, from huggingface.co/settings/tokens"
        )


def upload(folder: str | os.PathLike[str], name: str, *, without: str | None = None) -> str:
    """Upload a folder to the hub, into a repository that is made if missing.

    Args:
        folder: Folder to upload.
        name: Name of the repository, ``user/name``.
        without: Subfolder that is not uploaded.

    Returns:
        URL of the repository.

    Raises:
        ConfigError: If the name is not ``user/name``, or a token is missing.
        UploadError: If the hub cannot be reached or refuses.
    """
    check_upload(name)
    hub = require("huggingface_hub", "lm")
    try:
        api = hub.HfApi()
        address = str(api.create_repo(name, exist_ok=True))
        left = None if without is None else [f"{without}/*"]
        api.upload_folder(repo_id=name, folder_path=os.fspath(folder), ignore_patterns=left)
    except Exception as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UploadError(
            f"{folder} is written, and uploading it to {name} failed ({why}); check the network, the name and HF_TOKEN"
        ) from error
    return address

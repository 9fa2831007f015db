"""Downloads from the Hugging Face hub, whose client is optional."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from nvembed_deploy.errors import HubError, MissingExtra

HUB_NAME = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
MAX_REASON_CHARS = 200


def is_hub_name(name: str) -> bool:
    """Returns True for the name of a repository, such as `nvidia/NV-Embed-v2`, unless its first part is a folder."""
    return bool(HUB_NAME.match(name)) and not Path(name.partition("/")[0]).exists()


def download(name: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """Downloads the files of a repository that match any of the patterns.

    Args:
        name: Name of the repository.
        revision: Commit, branch or tag; None for the newest commit.
        patterns: Names of files, with `*` for any characters.

    Returns:
        The folder in the hub's cache, named after the commit.

    Raises:
        HubError: The repository does not exist, may not be read, or the hub cannot be reached.
        MissingExtra: The hub's client is not installed.
    """
    try:
        from huggingface_hub import errors, snapshot_download
    except ImportError as err:
        raise MissingExtra(
            f"{name} is not a folder here; to download it from the hub, run: pip install huggingface_hub"
        ) from err
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
    except errors.GatedRepoError as err:
        raise HubError(
            f"{name} is gated on the hub: accept its terms on its page, then log in with `hf auth login`"
        ) from err
    except errors.RevisionNotFoundError as err:
        raise HubError(f"{name} has no revision {revision!r} on the hub; check it on the repository's page") from err
    except errors.RepositoryNotFoundError as err:
        raise HubError(
            f"{name} is not a folder here, and does not exist on the hub or is private; check the name, or log in with "
            "`hf auth login`"
        ) from err
    except Exception as err:  # the client's other errors, those of its HTTP library and the system's
        reason = (str(err).strip().splitlines() or [type(err).__name__])[0][:MAX_REASON_CHARS]
        raise HubError(
            f"{name} is not a folder here, and it could not be downloaded from the hub ({reason}); check the name and "
            "the network, or download it on another machine and pass its folder"
        ) from err

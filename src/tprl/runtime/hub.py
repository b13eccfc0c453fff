"""What is fetched from the Hugging Face hub and sent there."""

import socket
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache
from huggingface_hub.constants import ENDPOINT, HF_HUB_OFFLINE
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from tprl.errors import UserError


def within_reach(source: str) -> bool:
    """Whether loading a folder or hub id can succeed at all. Asked first, because the hub's client
    retries for long without a network."""
    if Path(source).is_dir():
        return True
    try:
        # The cache is asked before the network.
        if isinstance(try_to_load_from_cache(source, "config.json"), str):
            return True
    except HFValidationError:
        return False
    return _hub_answers()


def _hub_answers() -> bool:
    if HF_HUB_OFFLINE:
        return False
    if getproxies().keys() - {"no"}:  # only the client can tell
        return True
    hub = urlsplit(ENDPOINT)
    try:
        with socket.create_connection((hub.hostname or "", hub.port or 443), timeout=3):
            return True
    except OSError:
        return False


def fetch(repo: str, files: Sequence[str], revision: str | None = None) -> Path:
    """The folder that holds `files` of a hub repository, downloaded or from the cache.

    Raises:
        UserError: no such repository, or it is out of reach.
    """
    try:
        if not within_reach(repo):
            raise OSError("it is not cached, and the hub does not answer")
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(files)))
    except (OSError, ValueError) as error:  # the hub's own errors are among them
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{repo} is neither a folder nor within reach on the hub ({reason}): give the "
            "directory that a training run printed as `run:`, or check the hub id."
        ) from error


def push(folder: Path, repo: str, private: bool = False, token: str | None = None) -> str:
    """Upload a folder's files to a model repository, which is made if it does not exist; returns
    its address.

    Raises:
        UserError: the hub is out of reach, or refuses.
    """
    if not _hub_answers():
        raise UserError(
            f"the hub does not answer, so {repo} cannot be "
            "written: save_pretrained keeps a local folder."
        )
    # Private or not is decided when the repository is made, and stays.
    api = HfApi(token=token)
    try:
        address = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repo, folder_path=folder, commit_message="Pruner of visual tokens (TPRL)"
        )
    except (HfHubHTTPError, HFValidationError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{repo} cannot be written ({reason}): log in with `hf auth login`, or pass a token."
        ) from error
    return str(address)

"""Upload of an output folder to a repository of the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from adapter_merge.errors import InputError, OutputError

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
TOKEN_HINT = "state a token with write permission: --token, HF_TOKEN or `hf auth login`"


def check_upload(repository: str, *, replace: bool, token: str | None = None) -> None:
    """Raise where `repository` (organisation/name) cannot be written, before anything is computed.

    replace: the repository may exist already. token: None uses HF_TOKEN or the token of `hf auth login`. Raises
    InputError for a wrong name, OutputError for an offline hub, a refused token or a repository that exists.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    if not REPOSITORY.fullmatch(repository):
        raise InputError(f"{repository}: not a repository of the hub", expected="organisation/name")
    if constants.HF_HUB_OFFLINE:
        raise OutputError(
            f"{repository}: HF_HUB_OFFLINE is set, so nothing is uploaded", hint="unset it, or upload later"
        )
    try:
        api = HfApi(token=token)
        api.whoami()
        exists = api.repo_exists(repository)
    except (HfHubHTTPError, LocalTokenNotFoundError) as error:
        raise OutputError(
            f"{repository}: the hub refuses the token", got=_first_line(error), hint=TOKEN_HINT
        ) from error
    except Exception as error:  # no connection: the exception type differs between versions of the client
        raise OutputError(
            f"{repository}: the hub cannot be reached", got=_first_line(error), hint="check the network"
        ) from error
    if exists and not replace:
        raise OutputError(
            f"{repository}: exists already", hint="choose another --push-to, or use --overwrite to add a commit to it"
        )


def upload_folder(
    folder: Path, repository: str, *, private: bool = True, message: str, token: str | None = None
) -> str:
    """Create `repository` (private by default), upload `folder` as one commit, and return the commit's URL.

    A repository that exists keeps its visibility. Raises OutputError; the folder stays as it is.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi(token=token)
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.upload_folder(repo_id=repository, folder_path=folder, commit_message=message)
    except (HfHubHTTPError, OSError) as error:
        raise OutputError(
            f"{repository}: the upload failed", got=_first_line(error), hint=f"{folder} is complete: upload it again"
        ) from error
    return str(commit.commit_url)


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]

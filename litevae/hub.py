"""Files on the Hugging Face hub: download and upload by its own library, with errors in our words."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from litevae.card import CARD_FILE
from litevae.errors import InvalidInput, MissingFile, extra

_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


def download(repo: str, file: str, revision: str | None = None) -> Path:
    """Download a file, or find it in the library's cache.

    Args:
        repo: `OWNER/NAME`.
        file: its path in the repository.
        revision: branch, tag or commit; `main` if None.

    Raises:
        MissingPackage: huggingface_hub is not installed.
        MissingFile: there is no such repository, revision or file, or the hub cannot be reached and the file is not in
            the cache.
        InvalidInput: access is refused, or the name is not one that a repository can have.
    """
    with extra("hub"):
        from huggingface_hub import hf_hub_download
    with _in_words(repo, revision, file):
        return Path(hf_hub_download(repo, file, revision=revision))


def push(
    save: Callable[[Path], None], repo: str, private: bool | None = None, token: str | None = None, **options: Any
) -> str:
    """Save a model to a folder and upload that as one commit; the repository is made if missing.

    A model card that the repository has already is kept, with its figures brought up to date.

    Args:
        save: writes the files into a folder that exists.
        repo: `OWNER/NAME`, or `NAME` for a repository of your own.
        private: whether a new repository is private; None follows the owner's default.
        token: for writing; None takes the one of `hf auth login` or HF_TOKEN.
        options: of `huggingface_hub.HfApi.upload_folder`, such as `commit_message`, `revision`, `create_pr`.

    Returns:
        Address of the commit.

    Raises:
        MissingPackage: huggingface_hub is not installed.
        MissingFile: there is no such revision.
        InvalidInput: the hub refuses or cannot be reached, or the name is not one that a repository can have.
    """
    with extra("hub"):
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HTTPError
    revision = options.get("revision")
    with _in_words(repo, revision), TemporaryDirectory() as temporary:
        api = HfApi(token=token)
        repo = api.create_repo(repo, private=private, exist_ok=True).repo_id
        folder = Path(temporary, repo.rpartition("/")[2])
        folder.mkdir()
        if api.file_exists(repo, CARD_FILE, revision=revision):
            shutil.copyfile(api.hf_hub_download(repo, CARD_FILE, revision=revision), folder / CARD_FILE)
        save(folder)
        try:
            return api.upload_folder(repo_id=repo, folder_path=folder, **options).commit_url
        except (RuntimeError, ValueError) as error:  # an upload that broke off, a card that the hub does not take
            if isinstance(error, HTTPError):
                raise
            raise InvalidInput(f"{repo}: {error} {error.__cause__ or ''}".rstrip()) from error


@contextmanager
def _in_words(repo: str, revision: str | None, file: str = "") -> Iterator[None]:
    """Replace the library's errors by ours, which name the repository, the revision, the file and what to do."""
    from huggingface_hub import constants, errors

    hub = constants.ENDPOINT
    name = f"{repo}@{revision}" if revision else repo
    at_revision = f" --revision {revision}" if revision else ""
    try:
        yield
    except errors.GatedRepoError as error:
        raise InvalidInput(f"{name}: access is granted by its owner: ask at {hub}/{repo}, then {_LOG_IN}") from error
    except errors.RepositoryNotFoundError as error:
        raise MissingFile(
            f"no checkpoint at {name}: there is no such file or folder, and {hub} has no such repository, or keeps it "
            f"private: check the name, or {_LOG_IN}"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise MissingFile(f"{repo} has no revision {revision or 'main'} on {hub}") from error
    except errors.LocalEntryNotFoundError as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        unreachable = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{hub} cannot be reached ({reason})"
        raise MissingFile(
            f"no checkpoint at {name}: there is no such file or folder, {file} of that repository is not in the cache, "
            f"{constants.HF_HUB_CACHE}, and {unreachable}: fetch it on a machine that is connected, with "
            f"`hf download {repo} {file}{at_revision}`, and give its path, or bring the cache here"
        ) from error
    except errors.EntryNotFoundError as error:
        raise MissingFile(f"{name} has no {file} on {hub}{_checkpoints(repo, revision)}") from error
    except errors.OfflineModeIsEnabled as error:
        raise InvalidInput(f"{name}: HF_HUB_OFFLINE is set, and this needs {hub}: unset it") from error
    except errors.HFValidationError as error:
        raise InvalidInput(f"{name}: not a name of a repository: {str(error).splitlines()[0]}") from error
    except errors.HfHubHTTPError as error:
        hint = f": {_LOG_IN}, with a token that may do this" if error.response.status_code in (401, 403) else ""
        raise InvalidInput(f"{name}: {hub} refuses: {error.response.status_code}{hint}") from error
    except errors.HTTPError as error:
        raise InvalidInput(f"{name}: {hub} cannot be reached: {error}") from error


def _checkpoints(repo: str, revision: str | None) -> str:
    """Say which checkpoint files a repository has; empty if it has none or does not tell."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError

    try:
        files = HfApi().list_repo_files(repo, revision=revision)
    except (HTTPError, OSError):
        return ""
    suffix = f"@{revision}" if revision else ""
    names = [f"{repo}/{file}{suffix}" for file in sorted(files) if file.endswith(".ckpt")]
    return f"; it has {', '.join(names)}" if names else ""

"""Files from the Hugging Face hub, and to it. Every error becomes one sentence; only data is downloaded, no code."""

import errno
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from dag.errors import RunError, UsageError

# The hub's rules for owner and name: words joined by single dots or hyphens.
_REPO = re.compile(r"(?=[^/]{1,96}/.{1,96}\Z)\w+(?:[.-]\w+)*/\w+(?:[.-]\w+)*", re.ASCII)


def snapshot(
    key: str,
    repo: str,
    patterns: Sequence[str],
    hint: str,
    revision: str | None = None,
    ignore: Sequence[str] | None = None,
) -> Path:
    """The folder of a repository's files, from the cache or downloaded.

    Args:
        key:      the recipe key that names the repository, for the error.
        patterns: which files, as shell patterns; those that match `ignore` are left out.
        hint:     what the user can do instead; it ends the error's sentence.

    Raises:
        RunError: the files cannot be fetched; one sentence says why.
    """
    from huggingface_hub import snapshot_download

    return _fetched(
        lambda: snapshot_download(
            repo, revision=revision, allow_patterns=list(patterns), ignore_patterns=list(ignore) if ignore else None
        ),
        f"{key}: {repo}",
        hint,
        revision,
    )


def file(key: str, repo: str, name: str, hint: str) -> Path:
    """One file of a repository, from the cache or downloaded; errors as in `snapshot`."""
    from huggingface_hub import hf_hub_download

    return _fetched(lambda: hf_hub_download(repo, name), f"{key}: {name} of {repo}", hint, None)


def _fetched(fetch: Callable[[], str], what: str, hint: str, revision: str | None) -> Path:
    try:
        return Path(fetch())
    except Exception as error:
        # The hub's library raises some errors from others, of which it keeps the cause alone.
        reasons = (_reason(cause, revision) for cause in reversed(list(_causes(error))))
        reason = next(filter(None, reasons), f"could not be downloaded ({type(error).__name__}): try again,")
    raise RunError(f"{what} {reason} {hint}")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and those that it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__


def _reason(error: BaseException, revision: str | None) -> str | None:
    """Why a file could not be fetched and what to do, as the middle of a sentence; None if the error does not tell."""
    from huggingface_hub import constants
    from huggingface_hub import errors as hub

    away = "is not in the local cache and the hub cannot be reached: connect once to download it,"
    kinds = {
        hub.GatedRepoError: "is gated: accept its terms on its page and log in with `hf auth login`,",
        hub.RepositoryNotFoundError: (
            "does not exist on the hub (or is private and you are not logged in): check the name,"
        ),
        hub.RevisionNotFoundError: f"has no revision {revision!r}: correct it,",
        hub.LocalEntryNotFoundError: away,
        hub.EntryNotFoundError: "is not in that repository: check the name,",
    }
    for kind, reason in kinds.items():
        if isinstance(error, kind):
            return reason
    # The library's downloader in Rust has no type for a full disk.
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "no space left" in str(error).lower():
        return f"does not fit on the disk of the cache, {constants.HF_HUB_CACHE}: free space or set HF_HOME to another disk,"
    if isinstance(error, PermissionError):
        return f"cannot be written to the cache, {constants.HF_HUB_CACHE}: mend its permissions or set HF_HOME to another folder,"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return f"is refused by the hub ({status}): accept its terms on its page, `hf auth login` with a token that may read it,"
    if status is not None:
        return f"could not be downloaded, the hub answered {status}: try again later,"
    # The hub's HTTP client raises its own family of connection errors, which changes between versions.
    return away if isinstance(error, OSError) else None


def check_repo(key: str, repo: str) -> None:
    """Raises UsageError, which begins with `key`, unless `repo` is owner/name as the hub allows it."""
    if not _REPO.fullmatch(repo):
        raise UsageError(
            f"{key}: {repo!r} is no name of a repository; write OWNER/NAME in letters, digits and _, joined by single - or ."
        )


def check_token(key: str) -> None:
    """Raises UsageError, which begins with `key`, if nobody is logged in to the hub."""
    from huggingface_hub import get_token

    if not get_token():
        raise UsageError(f"{key}: there is no token of the hub; log in with `hf auth login`, then run this again")


def push(key: str, folder: Path, repo: str, is_public: bool, message: str) -> str:
    """Upload a folder's files as one commit, and make the repository if there is none.

    Args:
        is_public: of a new repository, which is private otherwise; one that exists stays as it is.
        message:   of the commit.

    Returns:
        The address of the repository.

    Raises:
        RunError: the hub cannot be reached or refuses; one sentence that begins with `key` says why.
    """
    from huggingface_hub import HfApi
    from huggingface_hub import errors as hub

    api = HfApi()
    try:
        url = api.create_repo(repo, private=not is_public, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message)
        return str(url)
    except hub.OfflineModeIsEnabled:
        reason = "the hub is switched off by HF_HUB_OFFLINE; unset it"
    except hub.HfHubHTTPError as error:
        status = error.response.status_code
        reason = f"the hub answered {status}; try again later"
        if status in (401, 403, 404):
            reason = f"the hub answered {status}; log in with a token that may write there: `hf auth login`"
    except Exception as error:
        # As in `_fetched`: its HTTP client has errors of its own.
        reason = f"the hub cannot be reached ({type(error).__name__}); try again"
    raise RunError(f"{key}: not published: {reason}")

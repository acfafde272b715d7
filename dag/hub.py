"""Files from the Hugging Face hub. Every error becomes one sentence; only data is downloaded, no code."""

from collections.abc import Callable, Sequence
from pathlib import Path

from dag.errors import RunError


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
    from huggingface_hub import errors as hub

    try:
        return Path(fetch())
    except hub.GatedRepoError:
        reason = "is gated: accept its terms on its page and log in with `hf auth login`,"
    except hub.RepositoryNotFoundError:
        reason = "does not exist on the hub (or is private and you are not logged in): check the name,"
    except hub.RevisionNotFoundError:
        reason = f"has no revision {revision!r}: correct it,"
    except hub.LocalEntryNotFoundError:
        reason = "is not in the local cache and the hub cannot be reached: connect once to download it,"
    except hub.EntryNotFoundError:
        reason = "is not in that repository: check the name,"
    except (hub.OfflineModeIsEnabled, OSError):
        reason = "is not in the local cache and the hub cannot be reached: connect once to download it,"
    except Exception as error:
        # The hub's HTTP client raises its own family of connection errors, which changes between versions.
        reason = f"could not be downloaded ({type(error).__name__}): try again,"
    raise RunError(f"{what} {reason} {hint}")

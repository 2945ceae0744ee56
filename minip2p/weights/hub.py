"""A repository of the Hugging Face hub: the files needed become a folder of the cache."""

from __future__ import annotations

import sys
from collections.abc import Collection
from pathlib import Path

from .files import WeightsError, one_line
from .folder import STEMS, names_in, weights_files

CLIP = "openai/clip-vit-large-patch14"  # SD 1.x uses its tokenizer
MOVED = {"runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5"}

VOCABULARY = ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")
TOKENIZER = (*VOCABULARY, "added_tokens.json", "tokenizer.json")
SMALL_FILES = ["model_index.json", "minip2p.json", "scheduler/scheduler_config.json"]
SMALL_FILES += [f"{part}/config.json" for part in STEMS]
SMALL_FILES += [f"tokenizer/{name}" for name in TOKENIZER]


def cached(repo: str, name: str, revision: str | None = None) -> Path | None:
    """Return the folder of a repository in the local hub cache, if that file is in it."""
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(repo, name, revision=revision)
    return Path(path).parents[name.count("/")] if isinstance(path, str) else None


def hub_error(repo: str, error: Exception) -> WeightsError:
    """Return the error of the package for one of the hub's client."""
    from huggingface_hub import errors

    if repo in MOVED:
        why = f"it was deleted in 2024: take {MOVED[repo]}"
    elif isinstance(error, errors.GatedRepoError):
        why = f"accept its terms on https://huggingface.co/{repo}, then run `hf auth login`"
    elif isinstance(error, (errors.RepositoryNotFoundError, errors.RevisionNotFoundError)):
        why = "no such folder is here, and no such public repository on the Hugging Face hub"
    else:  # of many kinds, and of others in each version of the client
        reason = one_line(f"{type(error).__name__}: {error}", 200)
        why = f"no such folder is here, nor all of it in the cache, and the hub fails ({reason})"
    return WeightsError(f"{repo} can't be loaded: {why}.")


def download(repo: str, names: Collection[str], size: int, revision: str | None = None) -> Path:
    """Return the folder with these files of a repository, of which `size` bytes are missing."""
    from huggingface_hub import snapshot_download

    if size:
        amount = f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
        print(f"Downloading {amount} of {repo} to the Hugging Face cache", file=sys.stderr)
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(names)))
    except Exception as error:
        raise hub_error(repo, error) from error


def from_hub(repo: str, half: bool) -> Path:
    """Return a folder with a repository's model: downloads what the local cache lacks."""
    from huggingface_hub import HfApi

    try:
        info = HfApi().model_info(repo, files_metadata=True)
    except Exception as error:
        folder = cached(repo, "unet/config.json")
        if folder and is_complete(folder, half):
            return folder
        raise hub_error(repo, error) from error
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    files = [name for name in SMALL_FILES if name in sizes]
    files += weights_files(sizes, half, repo).values()
    missing = sum(sizes[name] for name in files if not cached(repo, name, info.sha))
    return download(repo, files, missing, info.sha)


def is_complete(folder: Path, half: bool) -> bool:
    """Tell whether a folder of the cache has the files that a model needs."""
    names = names_in(folder)
    try:
        weights_files(names, half, folder)
    except WeightsError:
        return False
    return "tokenizer/tokenizer.json" in names or "tokenizer/merges.txt" in names


def clip_tokenizer() -> Path:
    """Return a folder with CLIP's tokenizer, for a single file, which has none."""
    folder = cached(CLIP, "merges.txt")
    if folder and cached(CLIP, "vocab.json"):
        return folder
    try:
        return download(CLIP, VOCABULARY, 1_585_859)
    except WeightsError as error:
        raise WeightsError(
            "A single file has no tokenizer: pass as tokenizer the tokenizer/ folder of a Stable "
            f"Diffusion 1.x, since {error}"
        ) from error

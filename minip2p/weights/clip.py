"""CLIP's tokenizer (Radford et al. 2021), from the files in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..text import Tokenizer
from .files import Config, WeightsError, one_line, read_config

BEGIN, END = "<|startoftext|>", "<|endoftext|>"


def load_tokenizer(folder: Path) -> Tokenizer:
    """Load CLIP's tokenizer from tokenizer.json, or else from vocab.json and merges.txt.

    Raises WeightsError if the folder has neither, or if they cannot be read.
    """
    has_json = (folder / "tokenizer.json").is_file()
    if not has_json and not all((folder / n).is_file() for n in ("vocab.json", "merges.txt")):
        raise WeightsError(
            f"{folder} holds no tokenizer: it needs tokenizer.json, or vocab.json and merges.txt."
        )
    special = [special_token(folder, f"{kind}_token") for kind in ("bos", "eos", "pad")]
    try:
        if has_json:
            import tokenizers

            bpe = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        else:
            from transformers import CLIPTokenizerFast  # takes a second, and is seldom needed

            bpe = CLIPTokenizerFast.from_pretrained(folder, local_files_only=True).backend_tokenizer
        vocabulary = bpe.get_vocab(with_added_tokens=True)
    except MemoryError:
        raise
    except Exception as error:  # of many types
        raise WeightsError(
            f"The tokenizer in {folder} can't be read: {one_line(error)}."
        ) from error
    for token in special:
        if token not in vocabulary:
            raise WeightsError(f"The tokenizer in {folder} has no token {token!r}: load CLIP's.")
    return Tokenizer(bpe, *(vocabulary[token] for token in special))


def special_token(folder: Path, name: str) -> str:
    """Return the text of a special token: CLIP's own, unless a config names another."""
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        token: Any = read_config(folder / file, optional=True).get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            return token
        if token is not None:
            raise WeightsError(
                f"{folder / file} has {name} = {str(token)[:200]} where a tokenizer has a text: "
                "download it again."
            )
    return BEGIN if name == "bos_token" else END


def check_vocabulary(tokenizer: Tokenizer, folder: Path, config: Config) -> None:
    """Raise WeightsError if the tokenizer is not the one that the text encoder was trained with."""
    vocab_size = config.get("vocab_size", 49408)
    if len(tokenizer) != vocab_size:
        raise WeightsError(
            f"The tokenizer in {folder} has {len(tokenizer)} tokens and the text encoder of "
            f"{config.path} has {vocab_size}: pass the tokenizer that the model was made with."
        )

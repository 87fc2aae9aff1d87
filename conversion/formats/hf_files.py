"""The files beside the weights of a Hugging Face folder: which ones belong to it, copied."""

import json
from typing import Any

from etils import epath

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
_SIDE_SUFFIXES = (".json", ".txt", ".model", ".tiktoken", ".jinja", ".py")
_SIDE_NAMES = ("LICENSE", "NOTICE")
_SIDE_FOLDERS = ("additional_chat_templates",)
# JSON that describes the weights' files or a PyTorch run, and so not this checkpoint.
_NOT_SIDE = (".index.json", "trainer_state.json")


def copy_side_files(source: epath.PathLike, target: epath.PathLike) -> None:
    """Copies config, tokenizer, processor, chat template, generation config, licence and code."""
    source, target = epath.Path(source), epath.Path(target)
    for path in sorted(source.iterdir()):
        if path.is_dir():
            if path.name in _SIDE_FOLDERS:
                (target / path.name).mkdir()
                copy_side_files(path, target / path.name)
        elif path.name.endswith(_NOT_SIDE):
            continue
        elif path.name.endswith(_SIDE_SUFFIXES) or path.name in _SIDE_NAMES:
            (target / path.name).write_bytes(path.read_bytes())


def copy_tokenizer(source: epath.PathLike, target: epath.PathLike) -> None:
    """Copies the files of a folder's tokenizer, and nothing of its model."""
    source, target = epath.Path(source), epath.Path(target)
    for name in _TOKENIZER_FILES:
        if (source / name).exists():
            (target / name).write_bytes((source / name).read_bytes())


def write_json(path: epath.PathLike, value: dict[str, Any]) -> None:
    """Writes JSON as transformers does, with sorted keys."""
    epath.Path(path).write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")

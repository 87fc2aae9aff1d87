"""The tokenizer: transformers loads it from a folder; its ids are checked against the model's."""

from typing import Any, Protocol, runtime_checkable

from etils import epath

from ov2_jax.config.model import ModelConfig
from ov2_jax.core.errors import DataError


@runtime_checkable
class Tokenizer(Protocol):
    """The part of transformers' PreTrainedTokenizerFast that is used; its import takes a second."""

    backend_tokenizer: Any

    def decode(self, token_ids: Any) -> str: ...


IM_START, IM_END = "<|im_start|>", "<|im_end|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
IMAGE_PAD, VIDEO_PAD = "<|image_pad|>", "<|video_pad|>"
SPECIAL_TOKENS = (IM_START, IM_END, VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD)


def token_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a text as it is: special tokens in it count, and none are added.

    Calls the Rust tokenizer itself: transformers' wrapper sets truncation and padding on every
    call, which fails ("Already borrowed") when several threads share a tokenizer.
    """
    return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids


def check_tokenizer(tokenizer: object, model: ModelConfig) -> None:
    """Raises DataError unless every chat and vision token is one token, with the model's id."""
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise DataError(f"{type(tokenizer).__name__} has no tokenizer.json; a fast one is needed.")
    expected = {
        VISION_START: model.vision_start_token_id,
        VISION_END: model.vision_end_token_id,
        IMAGE_PAD: model.image_token_id,
        VIDEO_PAD: model.video_token_id,
    }
    for token in SPECIAL_TOKENS:
        ids = token_ids(tokenizer, token)
        if len(ids) != 1:
            raise DataError(f"The tokenizer splits {token}; it must be one special token.")
        if token in expected and ids[0] != expected[token]:
            raise DataError(
                f"The tokenizer's id of {token} is {ids[0]} but the model's config has "
                f"{expected[token]}; they must come from the same checkpoint."
            )
    size = tokenizer.backend_tokenizer.get_vocab_size(with_added_tokens=True)
    if size > model.text.vocab_size:
        raise DataError(
            f"The tokenizer has {size} tokens but the model's vocabulary only "
            f"{model.text.vocab_size}; they must come from the same checkpoint."
        )


def load_tokenizer(folder: epath.PathLike, model: ModelConfig) -> Tokenizer:
    """Loads a tokenizer folder and checks it; raises DataError with the reason."""
    from transformers import PreTrainedTokenizerFast

    if not (epath.Path(folder) / "tokenizer.json").exists():
        raise DataError(f"{folder} is not a tokenizer folder: it has no tokenizer.json.")
    # Not AutoTokenizer: it reads the model's config.json, whose model type only remote code
    # defines, and asks on the terminal whether to run that code.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder))
    check_tokenizer(tokenizer, model)
    return tokenizer

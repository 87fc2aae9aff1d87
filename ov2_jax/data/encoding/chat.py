"""Chat text: turns to token ids with their loss mask, and the whole prompt as one string.

The text is Qwen's layout. For training it is tokenised in pieces: system text, question with the
assistant's header, answer, and the newline between rounds, each on its own; an answer that begins
with a newline must not merge with the header's. Loss falls on an answer and its <|im_end|>.
A placeholder is one <|image_pad|> until after tokenisation and is then repeated, which gives the
same ids as repeating it in the text, as a special token never merges with its neighbours.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ov2_jax.data.encoding.tokenizer import (
    IM_END,
    IM_START,
    IMAGE_PAD,
    SPECIAL_TOKENS,
    VISION_END,
    VISION_START,
)
from ov2_jax.data.rejected import SampleError

MARK = re.compile("<(image|video)>")
_MARK_AND_NEWLINE = re.compile("<(image|video)>(\n?)")
IMAGE_TEXT = VISION_START + IMAGE_PAD + VISION_END


class Round(NamedTuple):
    """A question and its answer; only the last answer of a prompt may be missing."""

    question: str
    answer: str | None


class Chat(NamedTuple):
    system: str
    rounds: tuple[Round, ...]


class Piece(NamedTuple):
    """A text that is tokenised on its own."""

    text: str
    supervised: bool


def parse_chat(messages: Sequence[Mapping[str, str]], system_prompt: str, *, prompt: bool) -> Chat:
    """Messages to rounds. With `prompt` the last turn is a question, otherwise an answer.

    Raises SampleError: unknown_role, bad_turns, empty_answer, special_token_in_text, and
    placeholder_mismatch for a mark outside a question.
    """
    for message in messages:
        if message["role"] not in ("system", "user", "assistant"):
            raise SampleError("unknown_role", f"a message has the role {message['role']!r}")
        text = message["content"]
        for token in SPECIAL_TOKENS:
            if token in text:
                raise SampleError(
                    "special_token_in_text", f"{token} is spelled out in the {message['role']} text"
                )
        if message["role"] != "user" and MARK.search(text):
            raise SampleError(
                "placeholder_mismatch",
                f"a picture or clip is marked in the {message['role']} text; it can only stand in "
                "a question",
            )
    turns = list(messages)
    system = turns.pop(0)["content"] if turns and turns[0]["role"] == "system" else ""
    wanted = [("user", "assistant")[i % 2] for i in range(len(turns))]
    if [t["role"] for t in turns] != wanted or not turns or len(turns) % 2 != prompt:
        raise SampleError(
            "bad_turns",
            f"the roles are {', '.join(m['role'] for m in messages)}; questions and answers must "
            f"alternate, from user to {'user' if prompt else 'assistant'}",
        )
    texts = [t["content"] for t in turns]
    if any(not answer.strip() for answer in texts[1::2]):
        raise SampleError("empty_answer", "an assistant turn has no text")
    answers = [*texts[1::2], None] if prompt else texts[1::2]
    rounds = tuple(Round(q, a) for q, a in zip(texts[::2], answers, strict=True))
    return Chat(system or system_prompt, rounds)


def round_pieces(number: int, round_: Round, system: str) -> list[Piece]:
    """Round `number` (from 0) as the pieces that are tokenised each on its own."""
    pieces = []
    if number:
        pieces.append(Piece("\n", False))
    elif system:
        pieces.append(Piece(f"{IM_START}system\n{system}{IM_END}\n", False))
    pieces.append(Piece(f"{IM_START}user\n{round_.question}{IM_END}\n{IM_START}assistant\n", False))
    if round_.answer is not None:
        pieces.append(Piece(f"{round_.answer}{IM_END}", True))
    return pieces


def prompt_text(chat: Chat) -> str:
    """The same text in one string, as the checkpoint's chat template renders it."""
    return "".join(
        piece.text for i, r in enumerate(chat.rounds) for piece in round_pieces(i, r, chat.system)
    )


def frame_text(seconds: float | None, decimals: int, *, newline: bool) -> str:
    """A frame's placeholder with its time before it (None: no time)."""
    time = "" if seconds is None else f"<{seconds:.{decimals}f} seconds>"
    return time + IMAGE_TEXT + ("\n" if newline else "")


def replace_marks(text: str, replacement: Callable[[str], str]) -> str:
    """Replaces each mark, in order; `replacement` gets "image" or "video".

    A newline behind a mark is the one that its last frame ends with, as in the reference.
    """

    def place(match: re.Match[str]) -> str:
        placed = replacement(match.group(1))
        return placed if placed.endswith("\n") else placed + match.group(2)

    return _MARK_AND_NEWLINE.sub(place, text)


def pad_repeats(ids: np.ndarray, counts: Sequence[int], pad_id: int) -> np.ndarray:
    """int64 [n]: how often each token is to be repeated, counts[i] for the i-th placeholder."""
    pads = np.flatnonzero(ids == pad_id)
    if len(pads) != len(counts):
        raise SampleError(
            "placeholder_mismatch", f"the text has {len(pads)} placeholders for {len(counts)}"
        )
    repeats = np.ones(len(ids), np.int64)
    repeats[pads] = counts
    return repeats

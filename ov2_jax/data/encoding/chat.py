"""Chat text: the turns of a sample as pieces to tokenise, and the whole prompt as one string.

The text has Qwen's layout. For training it is tokenised in pieces, each on its own: the system
text, the question with the assistant's header, the answer, and the newline between rounds. So an
answer that begins with a newline does not merge with the header's newline. Loss falls on an answer
and its <|im_end|>.
A placeholder is one <|image_pad|> during tokenisation and is repeated afterwards. That gives the
same ids as repeating it in the text, because a special token never merges with its neighbours.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, Int64

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
    supervised: bool  # its tokens carry loss


def match_marks(
    messages: Sequence[Mapping[str, str]], images: int, videos: int, *, prepend: bool
) -> Sequence[Mapping[str, str]]:
    """Messages with as many marks as media.

    If the <image> marks differ from the pictures in number, `prepend` deletes them and puts a mark
    for every picture before the first question. Raises SampleError placeholder_mismatch.
    """
    marks = [mark for m in messages for mark in MARK.findall(m["content"])]
    found = marks.count("image"), marks.count("video")
    if found == (images, videos):
        return messages
    can_prepend = images and found[1] == videos and prepend
    asked = next((i for i, m in enumerate(messages) if m["role"] == "user"), None)
    if not can_prepend or asked is None:
        raise SampleError(
            "placeholder_mismatch",
            f"{found[0]} <image> marks for {images} pictures and {found[1]} <video> marks for "
            f"{videos} clips",
        )
    messages = [m | {"content": m["content"].replace("<image>", "")} for m in messages]
    question = messages[asked]["content"].lstrip("\n")
    pictures = "\n".join(["<image>"] * images)
    messages[asked] = messages[asked] | {"content": f"{pictures}\n{question}"}
    return messages


def parse_chat(messages: Sequence[Mapping[str, str]], system_prompt: str, *, prompt: bool) -> Chat:
    """Messages to rounds. The last turn is a question if `prompt`, otherwise an answer.

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
    """Round `number` (from 0) as pieces to tokenise each on its own."""
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

    As in the reference, a newline after a mark and the newline at the end of its last frame are
    one.
    """

    def place(match: re.Match[str]) -> str:
        placed = replacement(match.group(1))
        return placed if placed.endswith("\n") else placed + match.group(2)

    return _MARK_AND_NEWLINE.sub(place, text)


def pad_repeats(
    ids: Int[np.ndarray, " n"], counts: Sequence[int], pad_id: int
) -> Int64[np.ndarray, " n"]:
    """How often to repeat each token: counts[i] times the i-th placeholder, others once.

    Raises SampleError placeholder_mismatch.
    """
    pads = np.flatnonzero(ids == pad_id)
    if len(pads) != len(counts):
        raise SampleError(
            "placeholder_mismatch", f"the text has {len(pads)} placeholders for {len(counts)}"
        )
    repeats = np.ones(len(ids), np.int64)
    repeats[pads] = counts
    return repeats

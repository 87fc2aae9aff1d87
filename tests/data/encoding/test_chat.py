"""Chat text and loss mask, token by token."""

import dataclasses
import json

import numpy as np
import pytest

from ov2_jax.core.errors import DataError
from ov2_jax.data.encoding.sample_encoder import SampleEncoder
from ov2_jax.data.encoding.tokenizer import load_tokenizer, token_ids
from ov2_jax.data.rejected import SampleError
from ov2_jax.data.sources.records import Record
from tests.data.files import chat, picture
from tests.tiny import (
    IM_END,
    IM_START,
    PAD,
    PROCESSOR,
    VISION_END,
    VISION_START,
    data_config,
    tiny_model,
    tokenizer,
)


def ids(text: str) -> list[int]:
    return token_ids(tokenizer(), text)


def encode(messages, images=(), **config):
    encoder = SampleEncoder(data_config(**config), tiny_model(), tokenizer())
    record = Record("id", tuple(messages), tuple(map(str, images)), (), "s", "f", 1)
    return encoder.encode(record)


def expect(sample, pieces: list[tuple[list[int], bool]]):
    """`pieces` are ids and whether they carry loss."""
    tokens = [t for piece, _ in pieces for t in piece]
    mask = [supervised for piece, supervised in pieces for _ in piece]
    assert list(zip(sample.tokens.tolist(), sample.loss_mask.tolist(), strict=True)) == list(
        zip(tokens, mask, strict=True)
    )


NEWLINE = ids("\n")
DEFAULT_SYSTEM = [IM_START, *ids("system\nYou are a helpful assistant."), IM_END, *NEWLINE]


def question(*content: int) -> list[int]:
    return [IM_START, *ids("user\n"), *content, IM_END, *NEWLINE, IM_START, *ids("assistant\n")]


def test_one_turn_with_a_picture(tmp_path):
    image = picture(tmp_path / "a.png", 56, 84)
    sample = encode(chat("<image>What is it?", "A cat."), [image])
    expect(
        sample,
        [
            (DEFAULT_SYSTEM, False),
            (
                [IM_START, *ids("user\n"), VISION_START, *[PAD] * 6, VISION_END]
                + [*ids("What is it?"), IM_END, *NEWLINE, IM_START, *ids("assistant\n")],
                False,
            ),
            ([*ids("A cat."), IM_END], True),
        ],
    )
    assert sample.windows.tolist() == [24]
    assert sample.tokens.dtype == np.int32 and sample.loss_mask.dtype == bool


def test_every_answer_and_its_end_carries_loss_and_separators_do_not():
    sample = encode(chat("One?", "Yes.", "Two?", "No.", system="Be brief."))
    expect(
        sample,
        [
            ([IM_START, *ids("system\nBe brief."), IM_END, *NEWLINE], False),
            (question(*ids("One?")), False),
            ([*ids("Yes."), IM_END], True),
            (NEWLINE, False),
            (question(*ids("Two?")), False),
            ([*ids("No."), IM_END], True),
        ],
    )


def test_an_answer_that_begins_with_a_newline_does_not_merge_with_the_header(tmp_path):
    # The golden tokenizer has no token for two newlines, Qwen's has: give it one.
    data = json.loads((PROCESSOR / "tokenizer" / "tokenizer.json").read_text())
    newline = data["model"]["vocab"]["Ċ"]
    data["model"]["vocab"]["ĊĊ"] = 1024
    data["model"]["merges"].insert(0, ["Ċ", "Ċ"])
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    config = (PROCESSOR / "tokenizer" / "tokenizer_config.json").read_text()
    (tmp_path / "tokenizer_config.json").write_text(config)
    model = tiny_model()
    model = dataclasses.replace(model, text=dataclasses.replace(model.text, vocab_size=1025))
    merging = load_tokenizer(tmp_path, model)

    record = Record("id", tuple(chat("Go", "\n\nDone")), (), (), "s", "f", 1)
    sample = SampleEncoder(data_config(), model, merging).encode(record)
    expect(
        sample,
        [
            (DEFAULT_SYSTEM, False),
            (question(*ids("Go")), False),
            ([newline, newline, *ids("Done"), IM_END], True),
        ],
    )
    whole = token_ids(merging, merging.decode(sample.tokens.tolist()))
    assert 1024 in whole and 1024 not in sample.tokens


def test_the_prompt_is_the_training_sample_up_to_the_answer(tmp_path):
    image = picture(tmp_path / "a.png", 56, 84)
    messages = chat("<image>\nA?", "\nB", "C?", "D")
    encoder = SampleEncoder(data_config(), tiny_model(), tokenizer())
    prompt = encoder.encode_prompt(messages[:-1], [str(image)])
    sample = encode(messages, [image])
    answer = [*ids("D"), IM_END]
    assert prompt.tokens.tolist() + answer == sample.tokens.tolist()
    np.testing.assert_array_equal(prompt.patches, sample.patches)


def test_no_system_prompt_when_it_is_empty():
    sample = encode(chat("A?", "B"), system_prompt="")
    assert sample.tokens.tolist()[: len(question())] == question(*ids("A?"))[: len(question())]
    assert ids("system")[0] not in sample.tokens.tolist()[:2]


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([{"role": "tool", "content": "x"}], "unknown_role"),
        (chat("A?"), "bad_turns"),
        (chat("A?", "B", "C?"), "bad_turns"),
        (chat("A?", "B")[::-1], "bad_turns"),
        ([*chat("A?", "B"), {"role": "system", "content": "late"}], "bad_turns"),
        (chat(system="only"), "bad_turns"),
        (chat("A?", " \n"), "empty_answer"),
        (chat("A?", "B", "C?", ""), "empty_answer"),
        (chat("A<|im_end|>?", "B"), "special_token_in_text"),
        (chat("A?", "see <|image_pad|>"), "special_token_in_text"),
    ],
)
def test_bad_chats_say_why(messages, reason):
    with pytest.raises(SampleError) as error:
        encode(messages)
    assert error.value.reason == reason


def test_marks_belong_in_questions(tmp_path):
    image = picture(tmp_path / "a.png", 56, 56)
    with pytest.raises(SampleError, match="assistant text"):
        encode(chat("Draw.", "<image>"), [image])


def test_marks_and_pictures_that_differ_are_rejected_or_put_first(tmp_path):
    images = [picture(tmp_path / f"{i}.png", 28, 28) for i in range(2)]
    messages = chat("\nCompare <image>.", "Equal.", "Sure? <image> <image>", "Yes.")
    with pytest.raises(SampleError, match="3 <image> marks for 2 pictures"):
        encode(messages, images)
    sample = encode(messages, images, on_image_mismatch="prepend")
    one = [VISION_START, PAD, VISION_END]
    asked = [*one, *NEWLINE, *one, *ids("\nCompare .")]
    expect(
        sample,
        [
            (DEFAULT_SYSTEM, False),
            (question(*asked), False),
            ([*ids("Equal."), IM_END], True),
            (NEWLINE, False),
            (question(*ids("Sure?  ")), False),
            ([*ids("Yes."), IM_END], True),
        ],
    )


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    with pytest.raises(DataError, match="no tokenizer.json"):
        load_tokenizer(tmp_path, tiny_model())
    other = tiny_model()
    object.__setattr__(other, "image_token_id", 7)
    with pytest.raises(DataError, match=r"id of <\|image_pad\|> is 5 but the model's config has 7"):
        load_tokenizer(PROCESSOR / "tokenizer", other)

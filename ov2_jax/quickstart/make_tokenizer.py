"""Makes the small tokenizer that the quickstart ships: byte-level BPE over the tasks' texts.

    python -m ov2_jax.quickstart.make_tokenizer [--out=ov2_jax/quickstart/tokenizer]

A released model's head has 151936 rows, which would be most of a tiny model's work. This one has
Qwen's special tokens and chat layout, can encode any text (bytes), and has a token for each word
that the tasks use. Run it again when the tasks' words change; the result is committed, and a test
compares the two.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from absl import flags
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from conversion.formats.hf_tokenizer import CHAT_TEMPLATE
from ov2_jax.core.files import write_file
from ov2_jax.core.program import run
from ov2_jax.quickstart import tasks

FOLDER = Path(__file__).parent / "tokenizer"
DEFAULT_SYSTEM = "You are a helpful assistant."
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
# BPE may merge within these pieces: the default system prompt and the role headers as a whole (they
# are in every sample: 2 tokens instead of 11), the end of a timestamp, a word with its space, a
# mark. Digits are never merged, so a number is always spelled the same way.
PIECES = (
    r"system\nYou are a helpful assistant\.",
    r"(?:system|user|assistant)\n",
    r"\n<",
    r" seconds>",
    r"\p{N}",
    r" ?\p{L}+",
    r" ?[^\s\p{L}\p{N}]+",
    r"\s+",
)
CORPUS_SAMPLES = 400  # a task; few enough to be quick, many enough to see every word
# Above what the merges of the corpus need: it ends when nothing is left to merge.
MAX_VOCABULARY = 1024


TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "eos_token": "<|im_end|>",
    "pad_token": "<|endoftext|>",
    "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
    "clean_up_tokenization_spaces": False,
    "model_max_length": 32768,
}


def corpus() -> Iterator[str]:
    """The texts between special tokens, as the data pipeline tokenises them."""
    for task in tasks.TASKS:
        for k in range(CORPUS_SAMPLES):
            sample = tasks.make_sample(task, 0, k, heldout=False)
            yield f"system\n{sample.system or DEFAULT_SYSTEM}"
            for question, answer in sample.turns:
                text = question.replace("<image>", "\0").replace("<video>", "\0")
                yield from (part for part in f"user\n{text}".split("\0") if part)
                yield "assistant\n"
                yield answer
            if sample.clip is not None:
                yield "\n<0.0 seconds>"


def make_tokenizer() -> Tokenizer:
    """Trains the tokenizer; always the same one for the same tasks."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex("|".join(PIECES)), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=MAX_VOCABULARY,
        special_tokens=[AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Each piece once, in order: the tokenizer then depends on the tasks' words alone, and stays as
    # it is when only their difficulty or frequency is tuned.
    pieces = {piece for text in corpus() for piece, _ in split.pre_tokenize_str(text)}
    tokenizer.train_from_iterator(sorted(pieces), trainer)
    return tokenizer


def write_tokenizer(folder: Path) -> None:
    """Writes the three files that `transformers.AutoTokenizer.from_pretrained(folder)` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        "tokenizer.json": make_tokenizer().to_str(pretty=True),
        "tokenizer_config.json": json.dumps(TOKENIZER_CONFIG, indent=2) + "\n",
        "chat_template.jinja": CHAT_TEMPLATE,
    }
    for name, text in files.items():
        write_file(folder / name, text.encode())


def _define_flags() -> None:
    flags.DEFINE_string("out", str(FOLDER), "Folder of the tokenizer.")


if __name__ == "__main__":
    run(lambda given: write_tokenizer(Path(given.out)), _define_flags)

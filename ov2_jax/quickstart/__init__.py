"""The quickstart: a small data set of real files, and the job that trains a small model on it."""

from pathlib import Path

TOKENIZER = Path(__file__).parent / "tokenizer"

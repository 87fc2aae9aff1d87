"""How programs end: statuses, and errors as one sentence."""

import subprocess
import sys

import pytest

from tests.programs import PATIENCE, REPOSITORY

PROGRAM = """
from absl import flags
from ov2_jax.core.errors import DataError
from ov2_jax.core.program import run

def define_flags():
    flags.DEFINE_string("say-to", None, "Whom to greet.")
    flags.DEFINE_integer("status", None, "What to return.")

def main(given):
    if given.say_to == "nobody":
        raise DataError("There is nobody.")
    print("hello", given.say_to, *given.rest)
    return given.status

run(main, define_flags, rest={rest})
"""
WITH_CONFIG = """
from ov2_jax.core.program import run

def main(given):
    print(given.config_file.name, given.config.steps, given.config.optimizer.learning_rate)

run(main, lambda: None, config=True)
"""


def ended(program: str, *arguments: str) -> tuple[int, str, str]:
    """Status, stdout and stderr."""
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=PATIENCE)
    return done.returncode, done.stdout, done.stderr


def plain(*arguments: str, rest: bool = False) -> tuple[int, str, str]:
    return ended(PROGRAM.format(rest=rest), *arguments)


def test_a_program_gets_its_flags_and_its_return_value_is_the_status():
    assert plain("--say-to=all") == (0, "hello all\n", "")
    assert plain("--say-to=all", "--status=75") == (75, "hello all\n", "")


def test_a_user_error_is_one_sentence():
    assert plain("--say-to=nobody") == (1, "", "DataError: There is nobody.\n")


def test_arguments_that_are_no_flags():
    sentence = "Unknown arguments: all of you; --help lists the flags.\n"
    assert plain("all", "of", "you") == (1, "", sentence)
    assert plain("--", "--all", "of", rest=True) == (0, "hello None --all of\n", "")


def test_a_flag_that_does_not_exist():
    status, printed, error = plain("--shout")
    assert (status, printed) == (1, "") and "Unknown command line flag 'shout'" in error
    assert "Traceback" not in error


def test_a_config_and_its_overrides():
    overrides = "--config.steps=3", "--config.optimizer.learning_rate=0.5"
    found = ended(WITH_CONFIG, "--config=configs/quickstart.py", *overrides)
    assert found == (0, "quickstart.py 3 0.5\n", "")


@pytest.mark.parametrize("overrides", [(), ("--config.steps=3",)])
def test_a_config_file_that_does_not_exist(overrides):
    status, printed, error = ended(WITH_CONFIG, "--config=configs/none.py", *overrides)
    assert (status, printed) == (1, "") and error.count("\n") == 1
    assert error.startswith("ConfigError: The file that --config names cannot be loaded: ")
    assert "configs/none.py" in error


@pytest.mark.parametrize(
    "override",
    [
        "--config.optimizer.lr=1",
        "--config.step=3",  # ml_collections suggests `steps`
        "--config.a.b=1",
        "--config.steps.most=3",
        "--config.data.sources[7].path=a.jsonl",
    ],
)
def test_an_override_of_a_field_that_does_not_exist(override):
    error = (
        f"ConfigError: {override} names no field of the config; the fields are those of "
        "ov2_jax/config/.\n"
    )
    assert ended(WITH_CONFIG, "--config=configs/quickstart.py", override) == (1, "", error)


def test_only_the_wrong_override_is_named():
    overrides = "--config.steps=3", "--config.optimizer.lr=1", "--config.data.lookahead=4"
    _, _, error = ended(WITH_CONFIG, "--config=configs/quickstart.py", *overrides)
    assert error.startswith("ConfigError: --config.optimizer.lr=1 names no field of the config;")


def test_an_error_in_the_config_file(tmp_path):
    """A UserError is a sentence; any other is the file's bug, and its traceback names the line."""
    file = tmp_path / "mine.py"
    head = "from ov2_jax.config.build import experiment_config\n\ndef get_config():\n"
    file.write_text(f"{head}    return experiment_config({{'step': 3}})\n")
    assert ended(WITH_CONFIG, f"--config={file}") == (
        1,
        "",
        "ConfigError: config has no field step.\n",
    )
    file.write_text(f"{head}    return None.steps\n")
    status, _, error = ended(WITH_CONFIG, f"--config={file}")
    assert status == 1 and "mine.py" in error and "return None.steps" in error

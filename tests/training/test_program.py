"""The step as a program, for those who compile it without running it."""

import json
import subprocess
import sys

from tests.programs import PATIENCE, REPOSITORY


def test_a_planner_loads_no_transformers():
    """Only training.export needs Hugging Face's packages; they would be seconds of each start."""
    code = "import json, sys, launch.planner.measure; print(json.dumps(list(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        check=True,
        timeout=PATIENCE,
    )
    loaded = json.loads(done.stdout)
    assert "ov2_jax.training.program" in loaded
    assert not {"transformers", "tokenizers"} & set(loaded)

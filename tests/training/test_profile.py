"""Traces of chosen steps."""

import pytest

from ov2_jax.config.build import experiment_from
from ov2_jax.core.errors import ConfigError
from tests.tiny import config_of, run


def test_chosen_steps_are_traced(tmp_path, data):
    assert run(tmp_path / "run", data, steps=3, profile_steps=(2, 3)) == 3
    (trace,) = (tmp_path / "run/profile").rglob("*.xplane.pb")
    assert trace.stat().st_size > 10_000


@pytest.mark.parametrize("steps", [(1, 2), (3, 2), (2, 9), (2,)])
def test_steps_that_cannot_be_traced_are_one_sentence(tmp_path, data, steps):
    with pytest.raises(ConfigError, match=r"profile_steps is .* with 1 < first <= last <= steps 3"):
        experiment_from(config_of(tmp_path, data, steps=3, profile_steps=steps))

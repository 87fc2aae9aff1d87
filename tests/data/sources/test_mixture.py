"""Mixtures by weight, epochs and cap: exact counts, fair reading, resume, realised shares."""

import json
import pickle
from collections import Counter

import pytest

from ov2_jax.config.build import data_config_from
from ov2_jax.config.data import DataConfig, SourceConfig
from ov2_jax.config.pack import PackConfig
from ov2_jax.core.errors import ConfigError, DataError
from ov2_jax.data.loader.loader import make_loader
from ov2_jax.data.sources.mixture import Mixture, epoch_draws
from ov2_jax.training.monitoring.reporter import _counts
from tests.data.files import chat, write_jsonl
from tests.tiny import data_config, tiny_model, tokenizer


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """Data sets of 10, 40 and 100 samples, and an empty one."""
    root = tmp_path_factory.mktemp("mixture")
    sizes = {"a": 10, "b": 40, "c": 100, "empty": 0}
    return {
        name: str(
            write_jsonl(
                root / f"{name}.jsonl",
                [{"id": f"{name}{i}", "messages": chat("Q", "A " * (i % 7))} for i in range(size)],
            )
        )
        for name, size in sizes.items()
    }


def mixture(paths, *, seed=3, shuffle=True, **options):
    sources = [SourceConfig(paths[name], **how) for name, how in options.items()]
    return Mixture(sources, seed=seed, shuffle=shuffle)


def ids(mix, start: int, stop: int) -> list[str]:
    return [json.loads(mix[i].data)["id"] for i in range(start, stop)]


@pytest.mark.parametrize(
    ("options", "draws"),
    [
        ({"a": {}, "b": {}}, (10, 40)),
        ({"a": {"epochs": 3}, "b": {"epochs": 0.5}}, (30, 20)),
        ({"b": {"cap": 15}, "c": {"epochs": 2, "cap": 150}}, (15, 150)),
        ({"a": {"weight": 1}, "b": {"weight": 4}}, (10, 40)),
        ({"a": {"weight": 0.7}, "c": {"weight": 0.3}}, (77, 33)),
        ({"a": {"weight": 1}, "b": {"weight": 1}, "c": {"weight": 1}}, (50, 50, 50)),
        ({"a": {"weight": 1}, "b": {"weight": 1}, "c": {"weight": 5}}, (22, 21, 107)),
    ],
)
def test_an_epochs_samples_by_data_set(paths, options, draws):
    mix = mixture(paths, **options)
    assert mix.draws == draws and mix.epoch == sum(draws)
    for epoch in range(3):
        names = [i[0] for i in ids(mix, epoch * mix.epoch, (epoch + 1) * mix.epoch)]
        assert Counter(names) == dict(zip(options, draws, strict=True))


def test_nested_groups(paths):
    a, b, c = (SourceConfig(paths[name]) for name in "abc")
    group = SourceConfig(sources=(a, SourceConfig(paths["b"], cap=20)), weight=1)
    assert epoch_draws((group, SourceConfig(paths["c"], weight=3)), (10, 40, 100)) == (11, 22, 97)
    inner = SourceConfig(sources=(b, c), cap=70)
    outer = SourceConfig(sources=(inner, a), epochs=2)
    assert epoch_draws((outer,), (40, 100, 10)) == (40, 100, 20)


def test_all_samples_are_seen_equally_often(paths):
    """c gives 33 of its 100 a mixture epoch: nothing twice before all were seen once."""
    mix = mixture(paths, a={"weight": 0.7}, c={"weight": 0.3})
    read = ids(mix, 0, 6 * mix.epoch)
    from_c = [i for i in read if i[0] == "c"]
    assert len(set(from_c[:99])) == 99 and len(set(from_c[:33]) & set(from_c[33:99])) == 0
    assert max(Counter(from_c).values()) == 2
    from_a = Counter(i for i in read[: mix.epoch] if i[0] == "a")
    assert set(from_a.values()) == {7, 8}
    assert read[: mix.epoch] != read[mix.epoch : 2 * mix.epoch]


def test_reading_is_a_function_of_seed_and_place(paths):
    options = {"a": {"epochs": 2.5}, "b": {"cap": 7}}
    mix = mixture(paths, **options)
    again = pickle.loads(pickle.dumps(mixture(paths, **options)))
    assert ids(mix, 50, 90) == ids(again, 50, 90)
    assert ids(mix, 0, 30) != ids(mixture(paths, seed=4, **options), 0, 30)
    plain = mixture(paths, shuffle=False, **options)
    assert ids(plain, 25, 32) == [f"b{i}" for i in range(7)]
    assert ids(plain, 32 + 25, 64) == [f"b{i}" for i in range(7, 14)]  # it goes on


def test_several_plain_sources_are_read_as_one(paths):
    """As without any mixture: each epoch has each sample once."""
    mix = mixture(paths, a={}, b={})
    assert len(set(ids(mix, 0, 50))) == len(set(ids(mix, 50, 100))) == 50


def test_mixtures_that_cannot_be(paths):
    a, b = paths["a"], paths["b"]
    with pytest.raises(ConfigError, match=r"weights \[1, None\]; give every one"):
        DataConfig(sources=(SourceConfig(a, weight=1), SourceConfig(b)))
    with pytest.raises(ConfigError, match="source.sources has the weights"):
        SourceConfig(sources=(SourceConfig(a, weight=1), SourceConfig(b)))
    for bad, words in (
        ({"weight": 0}, "source.weight is 0"),
        ({"weight": 1, "cap": 3}, "source.weight is 1; it must be None if"),
        ({"epochs": -1}, "source.epochs is -1"),
        ({"epochs": float("nan")}, "source.epochs is nan"),
        ({"cap": 0}, "source.cap is 0"),
        ({"sources": (SourceConfig(b),)}, "source.path is .* left out"),
    ):
        with pytest.raises(ConfigError, match=words):
            SourceConfig(a, **bad)
    with pytest.raises(ConfigError, match="cap is 1.5; it must be of type int"):
        data_config_from({"sources": [{"path": a, "cap": 1.5}]})
    with pytest.raises(DataError, match="empty has a weight but no sample"):
        mixture(paths, empty={"weight": 1}, b={"weight": 1})
    with pytest.raises(DataError, match="a gets none of the 50 samples of an epoch"):
        mixture(paths, a={"weight": 0.001}, b={"weight": 1})


def test_a_mixture_is_a_config(paths):
    group = {"sources": ({"path": paths["a"], "epochs": 2}, {"path": paths["b"]}), "weight": 1}
    config = data_config_from({"sources": [group, {"path": paths["c"], "weight": 0.5}]})
    assert config.sources[0].sources[0] == SourceConfig(paths["a"], epochs=2.0)


def test_the_loader_reports_realised_shares_and_resumes(paths):
    sources = (
        SourceConfig(paths["a"], name="images", weight=3),
        SourceConfig(paths["b"], name="clips", weight=1),
    )

    def loader(**changes):
        return make_loader(
            data_config(sources=changes.pop("sources", sources), max_reject_share=1.0, lookahead=8),
            PackConfig(1, 64),
            tiny_model(),
            tokenizer(),
            packs_per_step=1,
            seed=1,
            rejects_path=paths["a"] + ".rejects",
        )

    iterator = loader()
    infos = [next(iterator)[1] for _ in range(40)]
    state = json.loads(json.dumps(iterator.get_state()))
    after = [next(iterator)[1] for _ in range(3)]
    iterator.close()
    (one, n, tokens), (two, m, more) = infos[-1].mixture
    assert (one, two) == ("images", "clips")
    assert n + m == sum(i.samples for i in infos) and tokens + more == sum(i.tokens for i in infos)
    metrics = _counts(infos[-1])
    assert metrics["mixture/samples/images"] == n / (n + m) == pytest.approx(0.75, abs=0.05)
    assert metrics["mixture/tokens/clips"] == more / (tokens + more)
    resumed = loader()
    resumed.set_state(state)
    assert [next(resumed)[1] for _ in range(3)] == after
    resumed.close()
    other = loader(sources=(sources[0], SourceConfig(paths["b"], name="clips", weight=3)))
    with pytest.raises(
        DataError, match=r"samples_by_source \[38, 12\] but this run has \[25, 25\]"
    ):
        other.set_state(state)
    other.close()

"""Orbax checkpoints of a run: parameters, optimizer, counters, loader and config.

Nothing is ever restored in part: a checkpoint that does not fit raises CheckpointError.
"""

import json
from collections.abc import Mapping
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp
from etils import epath

from ov2_jax.config.experiment import CheckpointConfig
from ov2_jax.core.errors import CheckpointError, DataError, describe
from ov2_jax.data.loader.resume import share_state
from ov2_jax.training.feed import Feed
from ov2_jax.training.optimizer import Tree
from ov2_jax.training.state import AbstractState, TrainState

ITEMS = ("params", "train_state", "loader", "config")

# One chunk a layer slice, so that export can read a stack of layers slice by slice.
_SAVE_ARGS = ocp.SaveArgs(chunk_byte_size=256 * 2**20, shard_axes=(0,))


def latest_step(workdir: epath.Path) -> int:
    """The newest step whose saving has finished, 0 if there is none."""
    folder = workdir / "checkpoints"
    return max(ocp.utils.checkpoint_steps(folder), default=0) if folder.exists() else 0


class RunCheckpoints:
    """Saves asynchronously; a step folder appears under its name only when it is whole."""

    def __init__(self, workdir: epath.Path, config: CheckpointConfig) -> None:
        self._folder = workdir / "checkpoints"
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=config.keep_last,
                keep_period=config.keep_every,
                enable_async_checkpointing=True,
            ),
            item_names=ITEMS,
        )

    def save(
        self,
        step: int,
        state: TrainState,
        loader: grain.DatasetIterator,
        config: Mapping[str, Any],
    ) -> None:
        """Copies the state off the devices, then writes in the background."""
        if step == self._manager.latest_step():
            return
        rest = state._asdict()
        params = rest.pop("params")
        self._manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.PyTreeSave(params, save_args=_each(params, _SAVE_ARGS)),
                train_state=ocp.args.PyTreeSave(rest),
                loader=grain.checkpoint.CheckpointSave(loader),
                config=ocp.args.JsonSave(json.loads(json.dumps(config))),
            ),
        )

    def restore(
        self, step: int, abstract: AbstractState, loader: grain.DatasetIterator, feed: Feed
    ) -> TrainState:
        """The state of a step, in the shardings of `abstract`; moves the loader to that step.

        Raises CheckpointError if anything is missing or of another shape, and DataError if the
        loader cannot go on from there: the data differ, or the number of processes does and there
        is no plan.
        """
        rest = abstract._asdict()
        params = rest.pop("params")
        try:
            got = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    params=_restore_args(params),
                    train_state=_restore_args(rest),
                ),
            )
            states = _loader_states(self._folder / str(step) / "loader")
            loader.set_state(share_state(states, feed.index, feed.count))
            loader.start_prefetch()  # while the step compiles
        except DataError:
            raise
        except Exception as e:
            reason = _difference(self._folder / str(step) / "train_state", rest)
            raise CheckpointError(
                f"The checkpoint of step {step} in {self._folder} cannot be restored into this "
                f"config's model and optimizer: {reason or describe(e)}"
            ) from e
        return TrainState(params=got.params, **got.train_state)

    def __enter__(self) -> "RunCheckpoints":
        return self

    def __exit__(self, *exc: object) -> None:
        self._manager.wait_until_finished()  # also if an error ended the run
        self._manager.close()


def _loader_states(folder: epath.Path) -> list[dict[str, Any]]:
    """The saved states of the loader, one for each share, in order of the shares.

    Processes of one share saved the same. Grain itself restores only a process's own.
    """
    found = sorted(
        (int(path.stem.removeprefix("process_").split("-of-")[0]), path)
        for path in folder.glob("process_*-of-*.json")
    )
    states = [json.loads(path.read_text()) for _, path in found]
    counts = {int(path.stem.split("-of-")[1]) for _, path in found}
    if counts != {len(found)}:
        raise ValueError(f"{folder} does not hold the loader's state of every process")
    return list({state["share"]: state for state in reversed(states)}.values())[::-1]


def _each(tree: Any, value: Any) -> Any:
    return jax.tree.map(lambda _: value, tree)


def _difference(folder: epath.Path, abstract: Tree) -> str | None:
    """A sentence on the arrays that a saved tree has and `abstract` lacks, or the reverse.

    None if both have the same, or if the folder is damaged.
    """
    try:
        tree = ocp.PyTreeCheckpointHandler().metadata(folder).tree
    except Exception:  # Orbax raises many kinds
        return None
    saved, wanted = (
        {
            jax.tree_util.keystr(path, simple=True, separator=".")
            for path, _ in jax.tree_util.tree_flatten_with_path(x)[0]
        }
        for x in (tree, abstract)
    )
    parts = [
        f"{verb} {', '.join(sorted(names)[:3])}" + f" and {len(names) - 3} more" * (len(names) > 3)
        for verb, names in (("has", saved - wanted), ("lacks", wanted - saved))
        if names
    ]
    if not parts:
        return None
    return f"it {' and '.join(parts)}; init_from starts a new run from its parameters."


def _restore_args(abstract: Tree) -> ocp.args.PyTreeRestore:
    return ocp.args.PyTreeRestore(
        item=abstract, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract)
    )


def restore_params(folder: epath.Path, abstract: Tree) -> Tree:
    """Parameters alone, from an Orbax `params` folder, with `abstract`'s dtypes and shardings."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        try:
            return checkpointer.restore(folder, args=_restore_args(abstract))
        except Exception as e:
            raise CheckpointError(
                f"The parameters in {folder} do not fit the model: {describe(e)}"
            ) from e

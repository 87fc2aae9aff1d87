"""Orbax checkpoints of a run: parameters, optimizer, step, loader, config and random stream.

Nothing is ever restored in part: what does not fit raises CheckpointError.
"""

import json
from collections.abc import Mapping
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp
from etils import epath

from ov2_jax.config.experiment import CheckpointConfig
from ov2_jax.core.errors import CheckpointError, DataError
from ov2_jax.data.loader.steps import share_state
from ov2_jax.training.feed import Feed
from ov2_jax.training.state import TrainState

ITEMS = ("params", "train_state", "loader", "config")

# One chunk a layer slice, so that export can read a stack of layers slice by slice.
_SAVE_ARGS = ocp.SaveArgs(chunk_byte_size=256 * 2**20, shard_axes=(0,))


def latest_step(workdir: epath.Path) -> int:
    """The newest step whose saving was finished, 0 if there is none."""
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
        self, step: int, abstract: TrainState, loader: grain.DatasetIterator, feed: Feed
    ) -> TrainState:
        """The state of a step, in the shardings of `abstract`, and the loader moved to it.

        Raises CheckpointError if anything is missing or of another shape, and DataError if the
        loader cannot go on from there: from other data, or without a plan with other processes.
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
            raise CheckpointError(
                f"The checkpoint of step {step} in {self._folder} cannot be restored into this "
                f"config's model and optimizer: {type(e).__name__}: {e}"
            ) from e
        return TrainState(params=got.params, **got.train_state)

    def __enter__(self) -> "RunCheckpoints":
        return self

    def __exit__(self, *exc: object) -> None:
        self._manager.wait_until_finished()  # whatever ended the run, a started save is finished
        self._manager.close()


def _loader_states(folder: epath.Path) -> list[dict[str, Any]]:
    """What the loader of each share saved, in their order; processes of one share saved the same.
    Grain itself restores only a process's own."""
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


def _restore_args(abstract: Any) -> ocp.args.PyTreeRestore:
    return ocp.args.PyTreeRestore(
        item=abstract, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract)
    )


def restore_params(folder: epath.Path, abstract: Any) -> Any:
    """Parameters alone, from an Orbax `params` folder, cast and sharded as `abstract` says."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        try:
            return checkpointer.restore(folder, args=_restore_args(abstract))
        except Exception as e:
            raise CheckpointError(
                f"The parameters in {folder} do not fit the model: {type(e).__name__}: {e}"
            ) from e

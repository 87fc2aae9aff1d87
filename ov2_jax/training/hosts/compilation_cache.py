"""Keeps compiled programs for the next start of a run."""

import os

import jax
from etils import epath

from ov2_jax.core.checkpoint_dir import absolute


def use_compilation_cache(workdir: epath.PathLike) -> None:
    """Keeps compiled programs in WORKDIR/compilation_cache, which all hosts see.

    JAX_COMPILATION_CACHE_DIR names another folder, which runs may share;
    JAX_ENABLE_COMPILATION_CACHE=false turns it off.
    """
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        folder = os.fspath(absolute(workdir) / "compilation_cache")
        jax.config.update("jax_compilation_cache_dir", folder)

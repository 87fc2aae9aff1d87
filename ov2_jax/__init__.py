"""ov2_jax: train LLaVA-OneVision-2 in JAX/Flax on TPU pods and GPU clusters."""

import os

# transformers brings tokenizers only; it would advise at every start to install PyTorch.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

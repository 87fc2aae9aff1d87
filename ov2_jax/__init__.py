"""ov2_jax: train LLaVA-OneVision-2 in JAX/Flax on TPU pods and GPU clusters."""

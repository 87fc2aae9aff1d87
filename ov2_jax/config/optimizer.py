"""The optimizer: what is trained, and how fast."""

import dataclasses

from ov2_jax.core.errors import ConfigError

PARTS = ("encoder", "merger", "decoder")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW of the recipes (docs/training.md); a part is the encoder, the merger or the decoder."""

    learning_rate: float = 1e-5
    end_learning_rate: float = 1e-6
    warmup_fraction: float = 0.002
    beta1: float = 0.9
    beta2: float = 0.99
    eps: float = 1e-5
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    # bfloat16 saves 2 of 12 bytes a parameter. The second moment is always float32: its changes by
    # 1 - beta2 = 1 % are near the smallest that a bfloat16 can hold.
    first_moment_dtype: str = "float32"
    train: tuple[str, ...] = PARTS  # a part that is not named is frozen
    # Peak learning rates of single parts; None takes `learning_rate`.
    encoder_learning_rate: float | None = None
    merger_learning_rate: float | None = None
    decoder_learning_rate: float | None = None

    def __post_init__(self) -> None:
        unknown = set(self.train) - set(PARTS)
        if unknown or not self.train:
            raise ConfigError(
                f"optimizer.train is {self.train!r}; it must name at least one of {PARTS}."
            )
        for part in PARTS:
            if self.peak(part) <= 0:
                raise ConfigError(
                    f"optimizer: the learning rate of the {part} is {self.peak(part)}; it must be "
                    f"positive. To freeze the {part}, leave it out of optimizer.train."
                )
        for name in ("beta1", "beta2", "warmup_fraction"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(
                    f"optimizer.{name} is {getattr(self, name)}; it must be in [0, 1)."
                )
        for name in ("eps", "clip_norm"):
            if getattr(self, name) <= 0:
                raise ConfigError(
                    f"optimizer.{name} is {getattr(self, name)}; it must be positive."
                )
        if self.first_moment_dtype not in ("float32", "bfloat16"):
            raise ConfigError(
                f"optimizer.first_moment_dtype is {self.first_moment_dtype!r}; it must be "
                "'float32' or 'bfloat16'."
            )
        for name in ("weight_decay", "end_learning_rate"):
            if getattr(self, name) < 0:
                raise ConfigError(
                    f"optimizer.{name} is {getattr(self, name)}; it must not be negative."
                )

    def peak(self, part: str) -> float:
        """The learning rate of a part after the warm-up."""
        value = getattr(self, f"{part}_learning_rate")
        return self.learning_rate if value is None else value

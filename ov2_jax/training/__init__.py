"""Everything between the data pipeline and a trained checkpoint; ov2_jax/train.py has the loop.

    start.py        the first state: random parameters, or those of a checkpoint
    state.py        TrainState, which is saved and restored
    feed.py         a process's packs as arrays over the whole mesh
    step.py         the optimizer step: loss, gradients, update, metrics
    loss.py         next-token loss in blocks
    optimizer.py    AdamW, schedules, trained and frozen parameters
    program.py      the step as one compiled program
    checkpoint.py   saving and restoring with Orbax
    export.py       the Hugging Face files that a run keeps (the only module that needs conversion)
    hosts/          several processes, signals, memory, compiled programs
    monitoring/     metrics, FLOPs, heartbeat, profile

docs/training.md has the commands, the metrics and the files of a run.
"""

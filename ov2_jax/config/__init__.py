"""Everything that a user can state about a run, as frozen dataclasses that check themselves.

    experiment.py   Experiment, the whole run, and its checkpoints (CheckpointConfig)
    model.py        sizes and constants of a model
    data.py         data sets, and how their samples are read
    pack.py         text rows and vision rows of a pack
    optimizer.py    what is trained, and how fast
    compute.py      precision, attention kernels, memory
    codec.py        codec-style selection of frames

The mesh's section, MeshConfig, is in ov2_jax/sharding/mesh.py. Each option is a field of one
section. A section raises ConfigError when it is made with a value that cannot work; the error has
the field, its value and the remedy.

    build.py        from a file of configs/ and its overrides to an Experiment
    checks.py       the form of such an error
    start.py        what a run takes from the checkpoint that it starts from
    hf.py           models as Hugging Face config.json files
    sizes.py        the sizes of the released models
"""

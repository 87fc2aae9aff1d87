"""The planner's parts; launch/plan.py is the program.

A plan is the report of what a config would do on a TPU slice; it is not a plan of packs, which
ov2_jax.data writes. `command` runs `compiling`, which starts `measure` in a process of its own.
There `hlo` reads a compiled program's text, `loops` finds how often each part of it runs, `memory`,
`flops`, `traffic` and `collectives` count what it costs, and `work` what the model needs for the
same batch. `chips` has the hardware's figures, `report` makes the plan and `show` shows it.
"""

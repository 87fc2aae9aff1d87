"""The planner's parts; launch/plan.py is the program.

`hlo` reads a compiled program's text, `loops` finds how often each part of it runs, `flops`,
`traffic` and `collectives` count what it does; `work` is what the model needs for the same batch,
`chips` what the hardware gives, `report` puts it together and `page` shows it.
"""

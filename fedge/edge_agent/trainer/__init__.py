"""The training process: runtimes and foreign graphs live in it, apart from the agent.

`jobs` is what passes between the two, `child` the process itself, `process` the agent's side of
it. It is kept warm between jobs and ended when idle, so its memory is used only while it trains.
"""

"""`python -m fedge.edge_agent.trainer`: the training process; the agent starts it."""

from fedge.edge_agent.trainer.child import main

main()

"""`python -m fedge.edge_agent` is `fedge-agent`."""

from fedge.edge_agent.cli import main

main()

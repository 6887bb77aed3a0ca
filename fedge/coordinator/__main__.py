"""`python -m fedge.coordinator` is `fedge`."""

from fedge.coordinator.cli import main

main()

"""Federated learning for fleets of small devices, over MQTT.

Three rooms: `fedge.schemas` is the contract, `fedge.coordinator` and `fedge.edge_agent` are its two
sides. Both import `schemas`; neither imports the other. This file imports nothing, so that a
device never loads more than it uses.
"""

__version__ = "0.1.0"

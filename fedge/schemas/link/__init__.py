"""How messages travel: the `Link` protocol and its two implementations.

`fedge.schemas.link.protocol` says what a link promises. `fedge.schemas.link.paho` keeps the promise
over a real broker and is the only module that imports paho; `fedge.schemas.link.memory` keeps it
over a seeded broker in memory that can drop, duplicate, reorder, delay and partition.
"""

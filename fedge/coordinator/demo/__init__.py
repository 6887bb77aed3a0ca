"""The demonstration: a whole federation on one computer, as separate programs over a real broker.

It starts what an operator and the owners of devices would start, with the same commands and
configuration files, watches their log events, and shows what came out. It is a user of the two
rooms, not a part of them: it knows their command lines, files and log events, and imports nothing
of the edge agent.
"""

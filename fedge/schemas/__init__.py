"""The contract between the coordinator and the devices.

What travels (messages, tensors, blobs), what it is called (topics, names, digests), how it travels
(links), and how each can be wrong (errors). Nothing here knows what a round decides or how a model
is trained, and nothing here imports torch.
"""

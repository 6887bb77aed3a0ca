"""The device's own examples: where they lie, how they are read, how virtual devices share them.

`open_examples` returns raw arrays as the device has them; the plan's feature specification turns
them into tensors. Nothing here knows a plan, a round or a network.

Import from the modules: `config` says where examples lie and needs no numpy; `examples` opens
them, `partition` divides them.
"""

"""What the host says of itself: the readings that eligibility is decided by.

`reader` takes them all, `power` reads the kernel's power supplies, `bus` asks logind and
NetworkManager, `override` takes the operator's file or command, `program` runs another program
within limits. Nothing here decides whether the device may train.
"""

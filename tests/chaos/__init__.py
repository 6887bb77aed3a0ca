"""The chaos kit: a real fleet under seeded faults, and a check of the promise from what is left.

    make chaos SECONDS=600 SEED=1            python -m tests.chaos --help

One process plays the network, the disks, the clocks, the power and one malicious device:

    agent d0 ──▶ proxy ─┐                      ┌─ proxy ──▶ coordinator
    agent d1 ──▶ proxy ─┼──▶ mosquitto ◀──────┤
    …                   │        ▲             └─ …
                        │        ├── observer: what the broker tells everybody
                        │        └── stranger: garbage, floods, replays, lies
                        └── evidence: every update, before a byte of it leaves its device

`schedule` decides what happens when, purely from the seed; `faults` and its neighbours do it;
`evidence` and `history` write down what was said and what the stores held meanwhile; `checks` judge
it afterwards, from the stores, the ledgers and arithmetic, and never from acknowledgements. Nothing
of `fedge` is imported by the judge but the export of a version, which is itself under test.
"""

"""Whole runs in virtual time against a model of the service; one number, the seed, determines everything.

`plan.py` draws the list, the limits, the faults and the crashes from the seed. `world.py` plays them, session after
session, until the run is complete. `oracle.py` checks what happened against the promises.
"""

"""A night in a millisecond: the real engine against a modelled service, in virtual time, from one seed.

`plan.py` draws from the seed what the list, the limits, the service's faults and the crashes are; `world.py` plays it,
session after session, until the run has come to its end; `oracle.py` holds what happened against the promises.
"""

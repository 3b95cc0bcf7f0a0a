"""A slow uplink with a round trip, between two network namespaces: the kernel's own TCP, over a pair of TUN devices.

`python -m uplink SCENARIO` runs in a namespace of its own, started by `unshare --net`. It starts a server in another
namespace, a router that passes packets between the two, and a run of the real engine. It prints what arrived, as JSON.
"""

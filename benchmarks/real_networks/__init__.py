"""Public networks with real inputs, by name; a module for each kind of input."""

from __future__ import annotations

from real_networks import octets, reading, tokens
from real_networks.base import Network

# The light ones first.
NETWORKS: dict[str, Network] = {
    network.name: network for module in (reading, octets, tokens) for network in module.NETWORKS
}

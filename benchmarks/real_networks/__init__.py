"""Public networks with real inputs, by name; a module for each kind of input."""

from __future__ import annotations

from real_networks import faces, octets, reading, series, sound, tokens
from real_networks.base import Network

NETWORKS: dict[str, Network] = {
    network.name: network for module in (reading, octets, tokens, sound, series, faces) for network in module.NETWORKS
}

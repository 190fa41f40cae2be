"""Networks by name: whatever a command line can point to, as a model with an example of its input."""

from .opening import Network, open_network
from .shapes import parse_input

__all__ = ["Network", "open_network", "parse_input"]

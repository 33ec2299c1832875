"""The api <-> gateway connection: authenticated, length-prefixed MessagePack over an abstract Unix socket or TCP."""

from gateway.link.client import GatewayClient, GatewayLostError
from gateway.link.engine_thread import Engine
from gateway.link.framing import Link, LinkError
from gateway.link.pool import GatewayPool
from gateway.link.server import GatewayServer

__all__ = ["Engine", "GatewayClient", "GatewayLostError", "GatewayPool", "GatewayServer", "Link", "LinkError"]

"""The data plane: token rows between a gateway and expert replicas over sockets of our own."""

"""Traffic that is made up or was seen elsewhere, to be played to a service."""

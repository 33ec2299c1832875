"""The planner process: follows the load stream, and says what to expect."""

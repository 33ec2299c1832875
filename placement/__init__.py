"""Policy, plan and (pure) placement decisions."""

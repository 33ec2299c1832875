"""The operator's policy: one YAML file that says how experts are cut into deployments, placed, scaled and run.

Unknown keys are refused with the nearest known one; every error names the file, the key and the remedy.
"""

from placement.policy.experts import DevicePolicy, ExpertPolicy, Override, ResourcePolicy, UnitPolicy
from placement.policy.gateway import ApiPolicy, GatewayPolicy, KeyPolicy
from placement.policy.planner import PlannerPolicy, PredictorPolicy
from placement.policy.policy import Policy
from placement.policy.reading import PolicyError, load_policy, parse_policy

__all__ = [
    "ApiPolicy",
    "DevicePolicy",
    "ExpertPolicy",
    "GatewayPolicy",
    "KeyPolicy",
    "Override",
    "PlannerPolicy",
    "Policy",
    "PolicyError",
    "PredictorPolicy",
    "ResourcePolicy",
    "UnitPolicy",
    "load_policy",
    "parse_policy",
]

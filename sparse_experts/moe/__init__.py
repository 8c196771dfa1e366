"""The sparse layer, its routers and its dispatchers.

x_BxLxD -> groups x_GxSxD -> router -> Assignment -> dispatcher -> y_BxLxD
"""

from sparse_experts.moe.assignment import Assignment
from sparse_experts.moe.capacity import CapacityRule
from sparse_experts.moe.dispatchers.all_experts import all_experts
from sparse_experts.moe.dispatchers.einsum import einsum
from sparse_experts.moe.dispatchers.gather import gather
from sparse_experts.moe.dispatchers.grouped import grouped
from sparse_experts.moe.layer import MoE
from sparse_experts.moe.metrics import summary
from sparse_experts.moe.record import FATES, Record
from sparse_experts.moe.routers.top_k import TopK, route

__all__ = [
  'FATES',
  'Assignment',
  'CapacityRule',
  'MoE',
  'Record',
  'TopK',
  'all_experts',
  'einsum',
  'gather',
  'grouped',
  'route',
  'summary',
]

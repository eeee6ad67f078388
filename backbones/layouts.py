"""How a released folder may hold the experts of a layer: a tensor for each, or all in one."""

EXPERT_LAYOUTS = ("per_expert", "stacked")

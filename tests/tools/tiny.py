"""Sizes of the small models that tests build: `HybridConfig(**DECODER | {"vocab_size": 61})`."""

# every kind of layer, odd sizes: the backbone against its references
BACKBONE = {
    "vocab_size": 61, "hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 12, "intermediate_size": 80, "ssm_state_size": 16, "mamba_num_heads": 4,
    "mamba_head_dim": 16, "n_groups": 2, "chunk_size": 16, "n_routed_experts": 8,
    "num_experts_per_tok": 2, "moe_intermediate_size": 40,
    "moe_shared_expert_intermediate_size": 56, "hybrid_override_pattern": "M*EM-*",
}
# one group of Mamba heads: what decodes or trains causally
DECODER = {
    "hybrid_override_pattern": "M*E-", "hidden_size": 32, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 32, "ssm_state_size": 8,
    "mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 1, "chunk_size": 8,
    "n_routed_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16, "tie_word_embeddings": True,
}
# two groups, short chunks, both directions: what denoises
DENOISER = {
    "hybrid_override_pattern": "M*-", "hidden_size": 32, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48, "ssm_state_size": 8,
    "mamba_num_heads": 4, "mamba_head_dim": 8, "n_groups": 2, "chunk_size": 4,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 24, "tie_word_embeddings": True,
    "mamba_direction": "bidirectional", "initializer_range": 0.4,
}
# few enough weights to be counted by hand
COUNTED = {
    "vocab_size": 31, "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1,
    "head_dim": 8, "intermediate_size": 24, "ssm_state_size": 4, "mamba_num_heads": 2,
    "mamba_head_dim": 8, "n_groups": 1, "n_routed_experts": 4, "num_experts_per_tok": 1,
    "moe_intermediate_size": 12, "moe_shared_expert_intermediate_size": 20,
    "hybrid_override_pattern": "M*E",
}
# wide enough that what a counter of products does not see is little
WIDE = {
    "vocab_size": 512, "hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 32, "intermediate_size": 256, "ssm_state_size": 32, "mamba_num_heads": 8,
    "mamba_head_dim": 32, "n_groups": 2, "n_routed_experts": 8, "num_experts_per_tok": 2,
    "moe_intermediate_size": 64, "moe_shared_expert_intermediate_size": 128, "chunk_size": 8,
    "hybrid_override_pattern": "M*-E", "num_nextn_predict_layers": 1,
}

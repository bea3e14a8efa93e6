"""Where `zo-estimate` was in version 0.1."""

raise ImportError(
    "zo_core.estimate is hf_zo.estimate now, because it reads configurations of transformers; "
    "write `from hf_zo.estimate import estimate, skeleton, Workload`, or python -m hf_zo.estimate"
)

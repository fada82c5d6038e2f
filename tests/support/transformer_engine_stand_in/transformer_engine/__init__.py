"""Not Transformer Engine: a stand-in on which Megatron's own layers for it run without a GPU, for tests alone.

Its classes have the names, constructor arguments, parameter names, marks on parameters, extra state and communication
of Transformer Engine's, compared with its sources at 2.20.0.dev0, and compute in plain torch over any backend of
torch.distributed. An argument that it does not serve is an error, not ignored.

A test that passes on it says nothing of:

- Transformer Engine's numerics: its kernels, their accuracy and determinism, other dtypes than the parameters';
- fused kernels: rotary embedding, attention (flash, cuDNN), permutation and scores of experts, cross-entropy, and the
  optimizers; Megatron finds none of them here and takes its own or torch's;
- context parallelism, attention other than causal, dropout, packed sequences;
- fp8 and fp4: recipes, parameters, states in checkpoints;
- userbuffers (--tp-comm-overlap), gradients of weights that are fused into the accumulation or computed later
  (--gradient-accumulation-fusion, --delay-wgrad-compute), one parameter for all experts (--moe-single-grouped-weight),
  the operation fuser, CUDA graphs, recomputation by its own checkpoint();
- Apex, NCCL, streams: what overlaps, and what waits for what.

Only ranks that put the folder above this package on their own sys.path may see it: it must never be installed.
"""

from . import common, pytorch

__version__ = "2.20.0"

__all__ = ["common", "pytorch"]

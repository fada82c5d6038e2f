"""Objectives: pure functions from token statistics to (loss value, label mass, residual masses).

Every objective here has, per token, the logit gradient

    g_k = M p_k - c_y [k = y] - sum_i c_i r_ik ,   r_i = softmax(a_i z + b_i t) ,   M = c_y + sum_i c_i

with z the student logits, p = softmax(z), y the label, t the logits of a second, frozen model. The masses c_y and c_i
and the residuals r_i are detached. Where M != 0 the objective pulls p towards the target distribution
Q = (c_y onehot(y) + sum_i c_i r_i) / M, with trust gamma = c_y / M in the observed token. A divergence
from r_1 of mass d adds d p_k (h_k - E_p h) to the gradient, whose target depends on p at each token of the vocabulary
by itself, and d to M.

An objective therefore states its residual coefficients (a, b) and computes a loss value and the masses from
statistics of size O(N). It never sees the vocabulary, a process group or a device, so it runs unchanged on every
backend and every parallel layout::

    @objectives.register("poly1")
    def poly1(epsilon: float = 1.0) -> Objective:
        def evaluate(stats, inputs):
            weight = 1 + epsilon * stats.p
            return stats.weighted_nll(weight), weight, ()

        return Objective(evaluate)

``published`` holds the objectives of the published SFT methods, ``whole_samples`` those that weigh samples as a
whole, ``extras`` further ones in the same style, ``divergences`` those from a teacher that are not its forward KL;
``registry`` says what an objective is, ``schedules`` how its parameters change over a training.
"""

from qtarget_megatron.objectives.constant_inputs import multiple_of_sft
from qtarget_megatron.objectives.divergences import jsd, mixed_kl, reverse_kl, skew_kl, skew_reverse_kl, total_variation
from qtarget_megatron.objectives.extras import deft, entropy_mask, focal, gift, poly1, talr
from qtarget_megatron.objectives.published import (
    anchored,
    asft,
    beyond_log,
    cft,
    dft,
    eaft,
    gem,
    hybrid_kd,
    idft,
    infosft,
    kd,
    label_smoothing,
    profit,
    psft,
    sft,
    sft_kl,
    target_sft,
    weighted_sft,
    wit,
)
from qtarget_megatron.objectives.registry import (
    Objective,
    check_token_input,
    describe,
    example,
    failure,
    from_arguments,
    get,
    names,
    register,
    register_from_file,
)
from qtarget_megatron.objectives.schedules import ScheduledObjective
from qtarget_megatron.objectives.whole_samples import iw_sft, pear, tsallis

__all__ = [
    "Objective",
    "ScheduledObjective",
    "anchored",
    "asft",
    "beyond_log",
    "cft",
    "check_token_input",
    "deft",
    "describe",
    "dft",
    "eaft",
    "entropy_mask",
    "example",
    "failure",
    "focal",
    "from_arguments",
    "gem",
    "get",
    "gift",
    "hybrid_kd",
    "idft",
    "infosft",
    "iw_sft",
    "jsd",
    "kd",
    "label_smoothing",
    "mixed_kl",
    "multiple_of_sft",
    "names",
    "pear",
    "poly1",
    "profit",
    "psft",
    "register",
    "register_from_file",
    "reverse_kl",
    "sft",
    "sft_kl",
    "skew_kl",
    "skew_reverse_kl",
    "talr",
    "target_sft",
    "total_variation",
    "tsallis",
    "weighted_sft",
    "wit",
]

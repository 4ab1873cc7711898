"""The objective as its formulas stand, in fp64 with plain autograd over all logits: what the tests hold the code to."""

from __future__ import annotations

import math

import torch
from torch import nn

from imagine_opd.kernels import OutputHead


def project(hidden_ND, head):
    """Logits [N, V] of a linear layer or an `OutputHead`."""
    if isinstance(head, nn.Linear):
        head = OutputHead(head.weight, head.bias)
    logits = hidden_ND @ head.weight_VD.T
    if head.bias_V is not None:
        logits = logits + head.bias_V
    logits = logits * head.logit_scale
    return head.softcap * torch.tanh(logits / head.softcap) if head.softcap else logits


def make_logprobs(scores, student_head, teacher_head, temperature=1.0, beta=0.0):
    """log p and log q [N, V], the latter of the tilted target, without gradient."""
    logp = (project(scores.student_hidden_ND, student_head) / temperature).log_softmax(-1)
    with torch.no_grad():
        logq = (project(scores.teacher_hidden_ND, teacher_head) / temperature).log_softmax(-1)
        if beta and scores.neutral_hidden_ND is not None:
            log0 = (project(scores.neutral_hidden_ND, teacher_head) / temperature).log_softmax(-1)
            logq = (logq + beta * (logq - log0)).log_softmax(-1)  # q ~ p+ (p+ / p0)^beta
    return logp, logq


def make_cells(logp, logq, topk):
    """Both sides over the student's k likeliest tokens and all others as one."""
    chosen = logp.topk(topk, dim=-1).indices
    is_tail = torch.ones_like(logp, dtype=torch.bool).scatter(1, chosen, False)
    tails = [(side.exp() * is_tail).sum(-1, keepdim=True).log() for side in (logp, logq)]
    return tuple(torch.cat([side.gather(1, chosen), tail], -1) for side, tail in zip((logp, logq), tails, strict=True))


def compute_divergence(logp, logq, alpha=1.0, topk=None, kl_clip=None):
    """[N]: the sum of the entries, each at most the clip."""
    if topk is not None:
        logp, logq = make_cells(logp, logq, topk)
    p, q = logp.exp(), logq.exp()
    if alpha == 1.0:
        entries = p * (logp - logq)
    elif alpha == 0.0:
        entries = q * (logq - logp)
    else:
        mixture = (alpha * q + (1 - alpha) * p).log()
        entries = (alpha * q * (logq - mixture) + (1 - alpha) * p * (logp - mixture)) / (alpha * (1 - alpha))
    return entries.clamp(max=math.inf if kl_clip is None else kl_clip).sum(-1)


def clip_policy(logp_y, logq_y, old, config, advantages=None):
    """[N]: -min(r A, clip(r) A), at most -c A where A < 0."""
    floor = -math.inf if config.log_prob_min_clamp is None else config.log_prob_min_clamp
    bound = math.inf if config.log_ratio_clamp is None else config.log_ratio_clamp
    if advantages is None:
        advantages = (logq_y.clamp(min=floor) - old.clamp(min=floor)).clamp(-bound, bound)
    ratio = (logp_y - old).clamp(-bound, bound).exp()
    rows = []
    for r, a in zip(ratio, advantages, strict=True):
        low_high = r.clamp(1 - config.epsilon, 1 + config.epsilon_high)
        loss = -torch.minimum(r * a, low_high * a)
        rows.append(torch.minimum(loss, -config.dual_clip * a) if a < 0 else loss)
    return torch.stack(rows)


def compute_objective(scores, student_head, teacher_head, config):
    """[N]: the weighted loss of each token."""
    beta = config.contrast_beta
    logp, logq = make_logprobs(scores, student_head, teacher_head, config.temperature, beta)
    y = scores.token_ids_N[:, None]
    logp_y, logq_y = logp.gather(1, y)[:, 0], logq.gather(1, y)[:, 0]
    old = scores.sampling_logprobs_N
    if config.distillation_mode == "sampled_token":
        loss = clip_policy(logp_y, logq_y, old, config, scores.advantages_N)
    else:
        topk = config.distillation_topk if config.distillation_mode == "topk_tail" else None
        loss = compute_divergence(logp, logq, config.distillation_alpha, topk, config.distillation_kl_clip)
        if config.loss_max_clamp is not None:
            loss = loss.clamp(max=config.loss_max_clamp)
        if config.distillation_is_clip is not None:
            loss = loss * (logp_y.detach() - old).exp().clamp(max=config.distillation_is_clip)
    weights = torch.ones_like(loss) if scores.weights_N is None else scores.weights_N
    if config.contrast_token_weight:
        weights = weights * weigh_evidence(scores, teacher_head, config.temperature)
    return weights * loss


def weigh_evidence(scores, teacher_head, temperature=1.0, floor=0.01):
    """[N]: max(log p+(y) - log p0(y), 0) plus a floor, over its weighted mean in each completion."""
    sides = [scores.teacher_hidden_ND, scores.neutral_hidden_ND]
    y = scores.token_ids_N[:, None]
    plus, zero = ((project(h, teacher_head) / temperature).log_softmax(-1).gather(1, y)[:, 0] for h in sides)
    gain = (plus - zero).clamp(min=0.0) + floor
    weights = torch.ones_like(gain) if scores.weights_N is None else scores.weights_N
    result = torch.empty_like(gain)
    for row in scores.row_N.tolist():
        here = scores.row_N == row
        result[here] = gain[here] / ((weights[here] * gain[here]).sum() / weights[here].sum())
    return result.detach()

"""Write `fixture.npz`: PPO losses and their gradients, computed by PyTorch in float64.

Needs PyTorch and NumPy only: nothing of the package under test takes part. Inputs are drawn in
float32, which float64 holds exactly. Arrays are named `family/value loss/field`, the fields
that PyTorch computed `family/value loss/expected/field`; `tests/test_parity.py` reads them.

B samples, A action dimensions, P outputs of the policy head.
"""

from pathlib import Path

import numpy as np
import torch
from torch import distributions as dist

B = 64
NUM_CATEGORIES = (3, 4)
LOW, HIGH = np.float32([-2.0, -1.0]), np.float32([6.0, 0.5])
COEFFICIENTS = {"clip_eps": 0.2, "vf_coef": 0.7, "ent_coef": 0.05}
VF_CLIP_EPS = {"unclipped": None, "clipped": 0.3}


def categorical(outputs, action):
    """Logits [B, P] and action [B] to log-probability [B] and entropy [B]."""
    distribution = dist.Categorical(logits=outputs)
    return distribution.log_prob(action), distribution.entropy()


def multi_categorical(outputs, action):
    """Logits [B, P], all parts' side by side, and action [B, A] to the same, summed over parts."""
    logits = outputs.split(NUM_CATEGORIES, dim=-1)
    parts = [categorical(part, action[:, i]) for i, part in enumerate(logits)]
    return sum(log_prob for log_prob, _ in parts), sum(entropy for _, entropy in parts)


def normal(outputs, action):
    """Means and log standard deviations [B, 2A] and action [B, A] to the same."""
    mean, log_std = outputs.chunk(2, dim=-1)
    distribution = dist.Independent(dist.Normal(mean, log_std.exp()), 1)
    return distribution.log_prob(action), distribution.entropy()


def tanh_normal(outputs, action):
    """As `normal`, of a = centre + half_range tanh(u), where `action` is u.

    The entropy is the mean of -log p(a), by the trapezoidal rule over u = mean + std z.
    """
    mean, log_std = outputs.chunk(2, dim=-1)
    centre, half_range = (torch.from_numpy(x).double() / 2 for x in (HIGH + LOW, HIGH - LOW))
    stretch = dist.AffineTransform(centre, half_range)
    squash = [dist.TanhTransform(), stretch]
    squashed = dist.TransformedDistribution(dist.Normal(mean, log_std.exp()), squash)
    z = torch.linspace(-8.0, 8.0, 1601, dtype=torch.float64)[:, None, None]
    grid = stretch(torch.tanh(mean + log_std.exp() * z))  # [1601, B, A]
    surprise = -squashed.log_prob(grid) * dist.Normal(0.0, 1.0).log_prob(z).exp()
    entropy = torch.trapezoid(surprise, z, dim=0).sum(-1)
    return squashed.log_prob(stretch(torch.tanh(action))).sum(-1), entropy


def draw_discrete(rng, sizes):
    """Logits [B, P] and a choice for each of `sizes`, [B, A]; [B] where there is one."""
    logits = rng.normal(0.0, 1.5, (B, sum(sizes))).astype(np.float32)
    noisy = np.split(logits + rng.gumbel(size=logits.shape), np.cumsum(sizes)[:-1], axis=-1)
    choices = np.stack([part.argmax(-1) for part in noisy], axis=-1).astype(np.int32)
    return logits, choices[:, 0] if len(sizes) == 1 else choices


def draw_gaussian(rng, size):
    """Means and log standard deviations [B, 2A], and an action [B, A]."""
    mean, log_std = rng.normal(0.0, 0.6, (B, size)), rng.uniform(-1.2, 0.0, (B, size))
    action = mean + np.exp(log_std) * rng.normal(size=(B, size))
    return np.concatenate([mean, log_std], axis=-1).astype(np.float32), action.astype(np.float32)


FAMILIES = {
    categorical: (draw_discrete, (5,)),
    normal: (draw_gaussian, 3),
    tanh_normal: (draw_gaussian, len(LOW)),
    multi_categorical: (draw_discrete, NUM_CATEGORIES),
}


def draw_case(rng, family, vf_clip_eps):
    """The inputs of one case by name; `vf_clip_eps` is left out where the value is unclipped."""
    draw, size = FAMILIES[family]
    outputs, action = draw(rng, size)
    log_prob, _ = family(torch.from_numpy(outputs).double(), torch.from_numpy(action))
    old_value = rng.normal(0.0, 1.0, B)
    numbers = {
        "outputs": outputs,
        "value": old_value + rng.normal(0.0, 0.5, B),
        "old_log_prob": log_prob.numpy() - rng.normal(0.0, 0.4, B),
        "old_value": old_value,
        "advantage": rng.normal(0.0, 1.0, B),
        "target": old_value + rng.normal(0.0, 1.0, B),
        **COEFFICIENTS,
        **({} if vf_clip_eps is None else {"vf_clip_eps": vf_clip_eps}),
        **({"low": LOW, "high": HIGH} if family is tanh_normal else {}),
    }
    return {"action": action} | {name: np.float32(x) for name, x in numbers.items()}


def ppo_loss(family, outputs, value, x):
    """Outputs [B, P], value [B] and the other inputs `x` by name to the loss and its terms."""
    log_prob, entropy = family(outputs, x["action"])
    ratio = torch.exp(log_prob - x["old_log_prob"])
    held = ratio.clamp(1 - x["clip_eps"], 1 + x["clip_eps"])
    terms = {"log_prob": log_prob, "entropy": entropy.mean()}
    terms["policy_loss"] = -torch.min(ratio * x["advantage"], held * x["advantage"]).mean()
    error = (value - x["target"]) ** 2
    if "vf_clip_eps" in x:
        change = (value - x["old_value"]).clamp(-x["vf_clip_eps"], x["vf_clip_eps"])
        error = torch.max(error, (x["old_value"] + change - x["target"]) ** 2)
    terms["value_loss"] = 0.5 * error.mean()
    weighted = x["vf_coef"] * terms["value_loss"] - x["ent_coef"] * terms["entropy"]
    return {"loss": terms["policy_loss"] + weighted} | terms


def expected(family, case):
    """What the package must reproduce: the loss and its terms, log_prob [B], and the gradients
    by the policy's outputs [B, P] and by the value [B]; float64."""
    x = {name: torch.from_numpy(np.asarray(array)) for name, array in case.items()}
    x = {name: t.double() if t.is_floating_point() else t for name, t in x.items()}
    outputs, value = (x.pop(name).requires_grad_() for name in ("outputs", "value"))
    results = ppo_loss(family, outputs, value, x)
    results["loss"].backward()
    results |= {"outputs_grad": outputs.grad, "value_grad": value.grad}
    return {name: tensor.detach().numpy() for name, tensor in results.items()}


def main():
    rng = np.random.default_rng(20170720)
    arrays = {}
    for family in FAMILIES:
        for value_loss, vf_clip_eps in VF_CLIP_EPS.items():
            case, prefix = draw_case(rng, family, vf_clip_eps), f"{family.__name__}/{value_loss}/"
            arrays |= {prefix + name: array for name, array in case.items()}
            results = expected(family, case)
            arrays |= {f"{prefix}expected/{name}": array for name, array in results.items()}
    np.savez_compressed(Path(__file__).with_name("fixture.npz"), **arrays)


if __name__ == "__main__":
    main()

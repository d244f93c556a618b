"""Write `fixture.npz`: PPO losses and their gradients, computed by PyTorch in float64.

Needs PyTorch and NumPy only: nothing of the package under test takes part. Inputs are drawn in
float32, which float64 holds exactly. Arrays are named `family/value loss/field`, the fields
that PyTorch computed `family/value loss/expected/field`; `tests/test_parity.py` reads them.

B samples, A action dimensions, P outputs of the policy head.
"""

import itertools
from pathlib import Path

import numpy as np
import torch
from torch import distributions as dist

B = 64
NUM_CATEGORIES = (3, 4)
LOW, HIGH = np.float32([-2.0, -1.0]), np.float32([6.0, 0.5])
COEFFICIENTS = {"clip_eps": 0.2, "vf_coef": 0.7, "ent_coef": 0.05}
VALUE_LOSSES = {"unclipped": {}, "clipped": {"vf_clip_eps": 0.3}}


def tensor(array):
    """Of the same shape; float64 if `array` is of floats."""
    array = torch.from_numpy(np.asarray(array))
    return array.double() if array.is_floating_point() else array


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
    stretch = dist.AffineTransform(*(tensor(x) / 2 for x in (HIGH + LOW, HIGH - LOW)))
    squash = dist.ComposeTransform([dist.TanhTransform(), stretch])
    squashed = dist.TransformedDistribution(dist.Normal(mean, log_std.exp()), squash)
    z = torch.linspace(-8.0, 8.0, 1601, dtype=torch.float64)[:, None, None]
    surprise = -squashed.log_prob(squash(mean + log_std.exp() * z))  # [1601, B, A]
    weighted = surprise * dist.Normal(0.0, 1.0).log_prob(z).exp()
    return squashed.log_prob(squash(action)).sum(-1), torch.trapezoid(weighted, z, dim=0).sum(-1)


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


FAMILIES = {categorical: (draw_discrete, (5,)), multi_categorical: (draw_discrete, NUM_CATEGORIES)}
FAMILIES |= {normal: (draw_gaussian, 3), tanh_normal: (draw_gaussian, len(LOW))}


def draw_case(rng, family):
    """The inputs of one case by name."""
    draw, size = FAMILIES[family]
    outputs, action = draw(rng, size)
    log_prob, _ = family(tensor(outputs), tensor(action))
    old_value = rng.normal(0.0, 1.0, B)
    numbers = {
        "outputs": outputs,
        "value": old_value + rng.normal(0.0, 0.5, B),
        "old_log_prob": log_prob.numpy() - rng.normal(0.0, 0.4, B),
        "old_value": old_value,
        "advantage": rng.normal(0.0, 1.0, B),
        "target": old_value + rng.normal(0.0, 1.0, B),
    } | ({"low": LOW, "high": HIGH} if family is tanh_normal else {})
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
    x = {name: tensor(array) for name, array in case.items()}
    outputs, value = (x.pop(name).requires_grad_() for name in ("outputs", "value"))
    results = ppo_loss(family, outputs, value, x)
    results["loss"].backward()
    results |= {"outputs_grad": outputs.grad, "value_grad": value.grad}
    return {name: result.detach().numpy() for name, result in results.items()}


def main():
    rng = np.random.default_rng(20170720)
    arrays = {}
    for family, (name, clip) in itertools.product(FAMILIES, VALUE_LOSSES.items()):
        scalars = {key: np.float32(x) for key, x in (COEFFICIENTS | clip).items()}
        case = draw_case(rng, family) | scalars
        results = {f"expected/{key}": array for key, array in expected(family, case).items()}
        arrays |= {f"{family.__name__}/{name}/{key}": x for key, x in (case | results).items()}
    np.savez_compressed(Path(__file__).with_name("fixture.npz"), **arrays)


if __name__ == "__main__":
    main()

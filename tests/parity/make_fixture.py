"""Write `fixture.npz`: losses and their gradients, computed by PyTorch in float64.

Needs PyTorch and NumPy only: nothing of the package under test takes part. Inputs are drawn in
float32, which float64 holds exactly. PPO's arrays are named `family/value loss/field`, the fields
that PyTorch computed `family/value loss/expected/field`; `tests/test_parity.py` reads them. Those
of losses on preferences begin with `preference/loss/case`, and
`tests/rlhf/test_preference_parity.py` reads them.

PPO: B samples, A action dimensions, P outputs of the policy head. Preferences: N pairs, of 2
sequences (chosen, rejected) of up to T tokens each, from a vocabulary of V.
"""

import itertools
from pathlib import Path

import numpy as np
import torch
from torch import distributions as dist
from torch.nn.functional import logsigmoid

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


N, T, V = 8, 7, 5
BETA = 0.5
"""The coefficient of direct preference optimisation."""


def draw_pairs(rng, case):
    """The inputs of one case by name. Sequences have `prompt` and then completion tokens, `length`
    in total. `logits` at a token predict the next one, `value` at the last token is the score.

    The differences of the scores and beta times those of the log ratios are of the order of 1, or
    80 if `case` is "extreme".
    """
    prompt = np.broadcast_to(rng.integers(1, 4, (N, 1)), (N, 2)).astype(np.int32)
    length = (prompt + rng.integers(1, T - 2, (N, 2))).astype(np.int32)
    tokens = rng.integers(V, size=(N, 2, T)).astype(np.int32)
    logits, value = rng.normal(0.0, 1.5, (N, 2, T, V)), rng.normal(0.0, 1.0, (N, 2, T))
    reference, margin = rng.normal(0.0, 1.0, (N, 2)), rng.normal(0.0, 1.0, N)
    of_policy = completion_log_prob(*map(tensor, (logits, tokens, prompt, length))).numpy()
    reference += of_policy
    if case == "extreme":
        far = np.where(np.arange(N) % 4, 40.0, -40.0)[:, None] * [1.0, -1.0]
        reference = of_policy - far / BETA
        np.put_along_axis(value, length[..., None] - 1, far[..., None], axis=-1)
        margin = np.zeros(N)
    numbers = {"logits": logits, "value": value, "reference": reference, "margin": margin}
    return {"tokens": tokens, "prompt": prompt, "length": length} | {
        name: np.float32(x) for name, x in numbers.items()
    }


def completion_log_prob(logits, tokens, prompt, length):
    """Sums `[N, 2]` of the log-probabilities of the tokens after the prompt."""
    log_prob = dist.Categorical(logits=logits[:, :, :-1]).log_prob(tokens[:, :, 1:])
    place = torch.arange(1, tokens.shape[-1])
    counted = (place >= prompt[..., None]) & (place < length[..., None])
    return torch.where(counted, log_prob, 0.0).sum(-1)


def bradley_terry(x):
    """The loss of each pair and the difference of the scores, `[N]`."""
    score = x["value"].gather(-1, x["length"].long()[..., None] - 1)[..., 0]
    gap = score[:, 0] - score[:, 1]
    return -logsigmoid(gap - x["margin"]) + x["centring"] * score.sum(-1) ** 2, gap


def log_ratio_gap(x):
    """The log ratio of the chosen completion minus that of the rejected one, `[N]`."""
    names = ("logits", "tokens", "prompt", "length")
    ratio = completion_log_prob(*(x[name] for name in names)) - x["reference"]
    return ratio[:, 0] - ratio[:, 1]


def sigmoid(x):
    gap = log_ratio_gap(x)
    return -logsigmoid(x["kl_coef"] * gap - x["margin"]), gap


def ipo(x):
    gap = log_ratio_gap(x)
    return (gap - 1 / (2 * x["kl_coef"])) ** 2, gap


PREFERENCE_LOSSES = {
    bradley_terry: {"centring": 0.01}, sigmoid: {"kl_coef": BETA}, ipo: {"kl_coef": BETA}
}  # fmt: skip


def expected_of_pairs(loss, case):
    """What the package must reproduce: the mean loss, the mean gap, and the gradients by the
    logits `[N, 2, T, V]` and the values `[N, 2, T]`; float64."""
    x = {name: tensor(array) for name, array in case.items()}
    inputs = {name: x[name].requires_grad_() for name in ("logits", "value")}
    each, gap = loss(x)
    mean = each.mean()
    gradients = torch.autograd.grad(mean, list(inputs.values()), materialize_grads=True)
    results = {"loss": mean, "margin": gap.mean()}
    results |= {f"{name}_grad": x for name, x in zip(inputs, gradients, strict=True)}
    return {name: result.detach().numpy() for name, result in results.items()}


def pairs():
    """The arrays of losses on preferences."""
    rng = np.random.default_rng(19520101)
    arrays = {}
    for (loss, given), name in itertools.product(PREFERENCE_LOSSES.items(), ("usual", "extreme")):
        scalars = {key: np.float32(x) for key, x in given.items()}
        case = draw_pairs(rng, name) | scalars
        results = {f"expected/{k}": x for k, x in expected_of_pairs(loss, case).items()}
        prefix = f"preference/{loss.__name__}/{name}"
        arrays |= {f"{prefix}/{key}": x for key, x in (case | results).items()}
    return arrays


def main():
    rng = np.random.default_rng(20170720)
    arrays = pairs()
    for family, (name, clip) in itertools.product(FAMILIES, VALUE_LOSSES.items()):
        scalars = {key: np.float32(x) for key, x in (COEFFICIENTS | clip).items()}
        case = draw_case(rng, family) | scalars
        results = {f"expected/{key}": array for key, array in expected(family, case).items()}
        arrays |= {f"{family.__name__}/{name}/{key}": x for key, x in (case | results).items()}
    np.savez_compressed(Path(__file__).with_name("fixture.npz"), **arrays)


if __name__ == "__main__":
    main()

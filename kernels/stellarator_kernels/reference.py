"""The specification: every op in plain torch, forward and backward, in any float dtype.

Sections, in the order of a model: attention, embedding, rope, bias_rope, dropout, layer_norm,
rms_norm, linear, bias_gelu, mlp, swiglu, cross_entropy, linear_cross_entropy, adamw, grad_norm.
Each computes in float32, or in float64 for float64 input, and returns the dtype of its input. No
Triton, no cleverness: this file is meant to be read.
"""

import math

import torch


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """float64 stays float64; everything else is computed in float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def visible_keys(T, S, *, causal=True, window=None, cu_seqlens=None, device=None) -> torch.Tensor:
    """(T, S) bool: query i may see key j. The last query is at the last key, S - 1.

    Causal: j <= i + S - T. Window: i + S - T - j < W. Packed: the same document.
    """
    rows = torch.arange(T, device=device)[:, None] + (S - T)
    keys = torch.arange(S, device=device)[None]
    visible = torch.ones(T, S, dtype=torch.bool, device=device)
    if causal:
        visible &= keys <= rows
    if window is not None:
        visible &= rows - keys < window
    if cu_seqlens is not None:
        ends = cu_seqlens[1:].long()
        visible &= torch.bucketize(rows, ends, right=True) == torch.bucketize(
            keys, ends, right=True
        )
    return visible


def _grouped(x: torch.Tensor, G: int) -> torch.Tensor:
    """(B, T, H, D) -> (B, T, G, H/G, D): query head h reads key/value head h // (H/G)."""
    return x.unflatten(2, (G, x.shape[2] // G))


def _capped(scores, softcap):
    """softcap * tanh(scores / softcap); None: the scores."""
    return scores if softcap is None else softcap * (scores / softcap).tanh()


def flash_attention_ref(q, k, v, visible, scale, softcap=None, dropped=None):
    """out = softmax(s) v over the visible keys and lse = log sum exp(s), s = cap(scale q k^T).

    q (B, T, H, D), k and v (B, S, G, D), visible (T, S) bool; out (B, T, H, D), lse (B, H, T) in
    nats. A row that sees no key has out 0 and lse -inf.  softcap: cap(s) = softcap tanh(s/softcap).
    dropped: factors (B, H, T, S) of the weights, 0 or 1/(1 - p); lse does not see them.
    """
    dtype, G = compute_dtype(q), k.shape[2]
    scores = torch.einsum("btgrd,bsgd->bgrts", _grouped(q.to(dtype), G), k.to(dtype)) * scale
    scores = _capped(scores, softcap).masked_fill(~visible, -math.inf)
    lse = scores.logsumexp(-1) if k.shape[1] else scores.new_full(scores.shape[:-1], -math.inf)
    weights = (scores - lse.nan_to_num(neginf=0.0)[..., None]).exp()
    if dropped is not None:
        weights = weights * dropped.to(dtype).view_as(weights)
    out = torch.einsum("bgrts,bsgd->btgrd", weights, v.to(dtype))
    return out.flatten(2, 3).to(q.dtype), lse.flatten(1, 2)


def flash_attention_backward_ref(
    dout, dlse, q, k, v, out, lse, visible, scale, softcap=None, dropped=None
):
    """dq, dk, dv; dlse (B, H, T) is the gradient of lse, or None.

    With s = cap(scale q k^T), P = exp(s - lse), factors M of dropout (or 1), and
    delta = rowsum(dout * out) - dlse:
    dv = (P M)^T dout;  dS = P * (M dout v^T - delta) * cap';  dq = scale dS k;  dk = scale dS^T q
    with cap' = 1 - (s / softcap)^2, or 1.
    """
    dtype, G = compute_dtype(q), k.shape[2]
    q_, dout_, out_ = (_grouped(x.to(dtype), G) for x in (q, dout, out))
    k_, v_ = k.to(dtype), v.to(dtype)
    lse = lse.to(dtype).nan_to_num(neginf=0.0).unflatten(1, (G, -1))[..., None]
    delta = (dout_ * out_).sum(-1).permute(0, 2, 3, 1)
    if dlse is not None:
        delta = delta - dlse.to(dtype).unflatten(1, (G, -1))
    scores = _capped(torch.einsum("btgrd,bsgd->bgrts", q_, k_) * scale, softcap)
    weights = (scores - lse).masked_fill(~visible, -math.inf).exp()
    factors = 1.0 if dropped is None else dropped.to(dtype).view_as(weights)
    dv = torch.einsum("bgrts,btgrd->bsgd", weights * factors, dout_)
    dweights = torch.einsum("btgrd,bsgd->bgrts", dout_, v_) * factors
    dscores = weights * (dweights - delta[..., None]) * scale
    if softcap is not None:
        dscores = dscores * (1.0 - (scores / softcap).square())
    dq = torch.einsum("bgrts,bsgd->btgrd", dscores, k_).flatten(2, 3)
    dk = torch.einsum("bgrts,btgrd->bsgd", dscores, q_)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def decode_attention_ref(q, k_cache, v_cache, lengths, window, scale):
    """Attention of the newest T tokens of each row to the first lengths[b] entries of its cache.

    Query t of row b is token lengths[b] - T + t; it sees itself and the W - 1 tokens before it.
    """
    rows = []
    for b, length in enumerate(lengths.tolist()):
        visible = visible_keys(q.shape[1], length, window=window, device=q.device)
        row = (q[b : b + 1], k_cache[b : b + 1, :length], v_cache[b : b + 1, :length])
        rows.append(flash_attention_ref(*row, visible, scale)[0])
    return torch.cat(rows) if rows else torch.empty_like(q)


def embedding_ref(ids, weight, positions=None, position_weight=None):
    """weight[ids] + position_weight[positions], rounded once."""
    if positions is None:
        return weight[ids]
    dtype = compute_dtype(weight)
    return (weight[ids].to(dtype) + position_weight[positions].to(dtype)).to(weight.dtype)


def embedding_backward_ref(dy, ids, num_rows):
    """dweight (num_rows, C): row v is the sum of dy[i] over all i with ids[i] = v."""
    dtype = compute_dtype(dy)
    sums = torch.zeros(num_rows, dy.shape[1], dtype=dtype, device=dy.device)
    return sums.index_add_(0, ids, dy.to(dtype)).to(dy.dtype)


def rope_table(positions: torch.Tensor, D: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of positions * theta^(-2i/D), each (M, D/2) fp32, M = number of positions.

    Always float32, in the order of operations of Hugging Face: a checkpoint was trained with these
    very angles, and at position 16,384 a rounding of the frequency already moves them by 1e-3.
    """
    exponents = torch.arange(0, D, 2, dtype=torch.float32, device=positions.device) / D
    angles = positions.reshape(-1, 1).float() * (1.0 / theta**exponents)
    return angles.cos(), angles.sin()


def rope_ref(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs (x[i], x[i + D/2]) of x (M, H, D) by the angles of the table (M, D/2)."""
    dtype = compute_dtype(x)
    first, second = x.to(dtype).chunk(2, dim=-1)
    cos, sin = cos.to(dtype)[:, None], sin.to(dtype)[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)


def bias_rope_ref(qkv, bias, cos, sin, H, G):
    """q (N, H, D), k and v (N, G, D) of x = qkv + bias (N, (H + 2G) * D), q and k rotated."""
    dtype = compute_dtype(qkv)
    x = qkv.to(dtype) if bias is None else qkv.to(dtype) + bias.to(dtype)
    q, k, v = x.unflatten(1, (H + 2 * G, -1)).split((H, G, G), 1)
    if cos is not None:
        q, k = rope_ref(q, cos, sin), rope_ref(k, cos, sin)
    return tuple(part.to(qkv.dtype, copy=True).contiguous() for part in (q, k, v))


def bias_rope_backward_ref(dq, dk, dv, cos, sin, need_bias=True):
    """dqkv = [dq turned back | dk turned back | dv]; dbias = sum(dqkv) before it is rounded."""
    parts = [part.to(compute_dtype(dq)) for part in (dq, dk, dv)]
    if cos is not None:
        parts[:2] = (rope_ref(part, cos, -sin) for part in parts[:2])
    dqkv = torch.cat([part.flatten(1) for part in parts], 1)
    return dqkv.to(dq.dtype), dqkv.sum(0).to(dq.dtype) if need_bias else None


def dropout_ref(x, dropped):
    """x * dropped; `dropped`: factors (N, C), 0 or 1/(1 - p). Also its own backward."""
    return (x.to(dropped.dtype) * dropped).to(x.dtype)


def dropped_sum_ref(x, residual=None, dropped=None):
    """x * dropped + residual, rounded once; `dropped`: factors (N, C), 0 or 1/(1 - p)."""
    s = x.to(compute_dtype(x))
    s = s if dropped is None else s * dropped
    return x if residual is None else (s + residual.to(s.dtype)).to(x.dtype)


def layer_norm_ref(x, weight, bias, eps, residual=None, dropped=None):
    """y = (s - mean) * rstd * weight + bias with s = x * dropped + residual; y, s, mean, rstd.

    s is rounded to the dtype of x before its statistics are taken. mean and rstd are (N, 1).
    """
    dtype = compute_dtype(x)
    summed = dropped_sum_ref(x, residual, dropped)
    s = summed.to(dtype)
    mean = s.mean(-1, keepdim=True)
    rstd = ((s - mean).square().mean(-1, keepdim=True) + eps).rsqrt()
    y = (s - mean) * rstd * weight.to(dtype)
    y = y if bias is None else y + bias.to(dtype)
    return y.to(x.dtype), summed, mean, rstd


def layer_norm_backward_ref(dy, summed, weight, mean, rstd, dsummed=None, dropped=None):
    """dx, dweight, dbias, and the gradient of the residual, which is dx without dropout.

    With g = dy * weight and n = (s - mean) * rstd:
    ds = rstd * (g - mean(g) - n * mean(g * n)) + dsummed;  dx = ds * dropped
    dweight = sum(dy * n);  dbias = sum(dy)
    """
    dtype = compute_dtype(summed)
    dy = dy.to(dtype)
    normalised = (summed.to(dtype) - mean) * rstd
    g = dy * weight.to(dtype)
    ds = rstd * (
        g - g.mean(-1, keepdim=True) - normalised * (g * normalised).mean(-1, keepdim=True)
    )
    ds = ds if dsummed is None else ds + dsummed.to(dtype)
    dx = (ds if dropped is None else ds * dropped).to(summed.dtype)
    dweight, dbias = (dy * normalised).sum(0), dy.sum(0)
    return dx, dweight.to(weight.dtype), dbias.to(weight.dtype), ds.to(summed.dtype)


def rms_norm_ref(x, weight, eps, residual=None, dropped=None):
    """y = s * rstd * weight with s = x * dropped + residual; returns y, s, rstd (N, 1)."""
    summed = dropped_sum_ref(x, residual, dropped)
    s = summed.to(compute_dtype(x))
    rstd = (s.square().mean(-1, keepdim=True) + eps).rsqrt()
    y = s * rstd if weight is None else s * rstd * weight.to(s.dtype)
    return y.to(x.dtype), summed, rstd


def rms_norm_backward_ref(dy, summed, weight, rstd, dsummed=None, dropped=None):
    """dx, dweight (None without a weight), and the gradient of the residual.

    With g = dy * weight and n = s * rstd:
    ds = rstd * (g - n * mean(g * n)) + dsummed;  dx = ds * dropped;  dweight = sum(dy * n)
    """
    dtype = compute_dtype(summed)
    dy, n = dy.to(dtype), summed.to(dtype) * rstd
    g = dy if weight is None else dy * weight.to(dtype)
    ds = rstd * (g - n * (g * n).mean(-1, keepdim=True))
    ds = ds if dsummed is None else ds + dsummed.to(dtype)
    dx = (ds if dropped is None else ds * dropped).to(summed.dtype)
    dweight = None if weight is None else (dy * n).sum(0).to(weight.dtype)
    return dx, dweight, ds.to(summed.dtype)


def product_ref(left, right, bias=None):
    """(N, K) @ (K, M) + bias (M,): a linear layer with right = weight^T; also its gradients."""
    dtype = compute_dtype(left)
    out = left.to(dtype) @ right.to(dtype)
    return (out if bias is None else out + bias.to(dtype)).to(left.dtype)


def bias_gelu_ref(x, bias, approximate="tanh"):
    """gelu(u), u = x + bias: u * Phi(u) ("none"), or with its tanh approximation ("tanh")."""
    dtype = compute_dtype(x)
    u = x.to(dtype) if bias is None else x.to(dtype) + bias.to(dtype)
    if approximate == "none":
        return (0.5 * u * (1 + torch.erf(u / math.sqrt(2)))).to(x.dtype)
    t = torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3))
    return (0.5 * u * (1 + t)).to(x.dtype)


def bias_gelu_backward_ref(dy, x, bias, approximate="tanh"):
    """dx = dy * gelu'(u), dbias = sum(dx) before dx is rounded (None without a bias).

    "none": gelu' = Phi(u) + u * phi(u);  "tanh", with t = tanh(a*(u + b*u^3)):
    gelu' = (1 + t) / 2 + u/2 * (1 - t^2) * a * (1 + 3*b*u^2)
    """
    dtype = compute_dtype(x)
    u = x.to(dtype) if bias is None else x.to(dtype) + bias.to(dtype)
    if approximate == "none":
        cdf = 0.5 * (1 + torch.erf(u / math.sqrt(2)))
        slope = cdf + u * torch.exp(-0.5 * u * u) / math.sqrt(2 * math.pi)
    else:
        a, b = math.sqrt(2 / math.pi), 0.044715
        t = torch.tanh(a * (u + b * u**3))
        slope = 0.5 * (1 + t) + 0.5 * u * (1 - t * t) * a * (1 + 3 * b * u * u)
    dx = dy.to(dtype) * slope
    return dx.to(x.dtype), None if bias is None else dx.sum(0).to(bias.dtype)


def mlp_up_ref(x, weight, bias, approximate="tanh"):
    """y = gelu(pre) and pre = x @ weight^T + bias, which is rounded before its gelu."""
    pre = product_ref(x, weight.t(), bias)
    return bias_gelu_ref(pre, None, approximate), pre


def mlp_down_gradient_ref(dout, weight, pre, approximate="tanh"):
    """dpre = (dout @ weight) * gelu'(pre), dbias = sum(dpre) before dpre is rounded, y = gelu(pre).

    dout (N, C), weight (C, F), pre (N, F).
    """
    dtype = compute_dtype(pre)
    dy = dout.to(dtype) @ weight.to(dtype)
    dpre, _ = bias_gelu_backward_ref(dy, pre.to(dtype), None, approximate)
    y = bias_gelu_ref(pre, None, approximate)
    return dpre.to(pre.dtype), dpre.sum(0).to(pre.dtype), y


def add_weight_gradient_ref(total, dy, x):
    """total + dy^T @ x, of (M, K), (N, M) and (N, K), in the dtype of total."""
    return total + dy.to(total.dtype).t() @ x.to(total.dtype)


def _activation(gate, activation):
    """The value and the slope of silu or gelu."""
    if activation != "silu":
        approximate = {"gelu_tanh": "tanh", "gelu_erf": "none"}[activation]
        slope, _ = bias_gelu_backward_ref(torch.ones_like(gate), gate, None, approximate)
        return bias_gelu_ref(gate, None, approximate), slope
    sigmoid = torch.sigmoid(gate)
    return gate * sigmoid, sigmoid * (1 + gate * (1 - sigmoid))


def swiglu_ref(gate, up, activation="silu"):
    """activation(gate) * up."""
    dtype = compute_dtype(gate)
    return (_activation(gate.to(dtype), activation)[0] * up.to(dtype)).to(gate.dtype)


def swiglu_backward_ref(dy, gate, up, activation="silu"):
    """dgate = dy * up * activation'(gate), dup = dy * activation(gate).

    silu(x) = x s, s = sigmoid(x): silu' = s (1 + x (1 - s)).
    """
    dtype = compute_dtype(gate)
    value, slope = _activation(gate.to(dtype), activation)
    dy = dy.to(dtype)
    return (dy * up.to(dtype) * slope).to(gate.dtype), (dy * value).to(gate.dtype)


def cross_entropy_ref(logits, targets, ignore_index=-100, z_loss=0.0):
    """lse - logits[target] + z_loss * lse^2, 0 where ignored; returns losses and lse (N,)."""
    x = logits.to(compute_dtype(logits))
    largest = x.amax(-1, keepdim=True)
    shifted = x - largest
    log_total = shifted.exp().sum(-1).log()
    valid = targets != ignore_index
    picked = shifted.gather(1, torch.where(valid, targets, 0)[:, None])[:, 0]
    lse = largest[:, 0] + log_total
    return torch.where(valid, log_total - picked + z_loss * lse.square(), 0.0), lse


def cross_entropy_backward_ref(dloss, logits, targets, lse, ignore_index=-100, z_loss=0.0):
    """dlogits = ((1 + 2*z_loss*lse) * softmax - onehot(target)) * dloss, 0 where ignored."""
    x = logits.to(lse.dtype)
    valid = (targets != ignore_index)[:, None]
    gradient = torch.exp(x - lse[:, None]) * (1 + 2 * z_loss * lse)[:, None]
    gradient -= (torch.arange(x.shape[1], device=x.device) == targets[:, None]).to(x.dtype)
    return torch.where(valid, gradient * dloss.to(lse.dtype)[:, None], 0.0).to(logits.dtype)


def cross_entropy_statistics_ref(logits, targets, ignored=None):
    """(3, N) of one shard of the classes: largest logit, sum exp(logit - largest), target's logit.

    targets: (N,) as classes of the shard; others are no class of it, their logit counts as 0. A
    token that is `ignored` (N,) has 0, 1, 0.
    """
    x = logits.to(compute_dtype(logits))
    largest = x.amax(-1)
    shift = torch.where(largest == -math.inf, 0.0, largest)
    inside = (targets >= 0) & (targets < x.shape[1])
    picked = x.gather(1, torch.where(inside, targets, 0)[:, None])[:, 0]
    total = (x - shift[:, None]).exp().sum(-1)
    found = torch.stack([largest, total, torch.where(inside, picked, 0.0)])
    if ignored is None:
        return found
    return torch.where(ignored, found.new_tensor([0.0, 1.0, 0.0])[:, None], found)


def linear_cross_entropy_ref(hidden, weight, targets, bias=None, ignore_index=-100, z_loss=0.0):
    """Cross entropy of logits = hidden @ weight^T + bias; returns losses, lse and the logits."""
    dtype = compute_dtype(hidden)
    logits = hidden.to(dtype) @ weight.to(dtype).t()
    logits = logits if bias is None else logits + bias.to(dtype)
    return *cross_entropy_ref(logits, targets, ignore_index, z_loss), logits


def linear_cross_entropy_backward_ref(
    dloss, hidden, weight, targets, lse, logits, bias=None, ignore_index=-100, z_loss=0.0
):
    """dhidden = dlogits @ weight, dweight = dlogits^T @ hidden, dbias = sum(dlogits)."""
    dlogits = cross_entropy_backward_ref(dloss, logits, targets, lse, ignore_index, z_loss)
    dhidden = (dlogits @ weight.to(dlogits.dtype)).to(hidden.dtype)
    dweight = (dlogits.t() @ hidden.to(dlogits.dtype)).to(weight.dtype)
    return dhidden, dweight, None if bias is None else dlogits.sum(0).to(bias.dtype)


def adamw_ref(weight, grad, exp_avg, exp_avg_sq, factors, *, beta1, beta2, eps, clip=None):
    """New (weight, exp_avg, exp_avg_sq) after one step.

    g = clip * grad;  m = m + (1 - beta1) * (g - m);  v = beta2 * v + (1 - beta2) * g^2
    w = decay * w - step_size * m / (sqrt(v) * root_correction + eps)
    with factors = decay: 1 - lr * weight_decay, step_size: lr / (1 - beta1^t),
    root_correction: (1 - beta2^t)^-1/2.
    """
    decay, step_size, root_correction = factors
    g = grad.to(weight.dtype)
    g = g if clip is None else g * clip.to(weight.dtype)
    m = exp_avg + (1 - beta1) * (g - exp_avg)
    v = beta2 * exp_avg_sq + (1 - beta2) * g.square()
    w = decay * weight - step_size * m / (v.sqrt() * root_correction + eps)
    return w, m, v


def sum_of_squares_ref(tensors, weights):
    """sum weight * x^2 over all elements of all tensors, in float64, 0-d; the norm is its root."""
    sums = [w * x.double().square().sum() for x, w in zip(tensors, weights, strict=True)]
    return torch.stack(sums).sum()

"""Losses as pure functions: arrays in, one scalar and named metrics out.

Letters: B batch, R pixel side, G grid side, K codes, P caption slots, I image tokens, V vocabulary,
E features.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

Metrics = dict[str, Float[Array, ""]]


def logit_laplace_nll(
    x: Float[Array, "B R R 3"],
    stats: Float[Array, "B R R 6"],
    *,
    min_log_scale: float | None = None,
) -> Float[Array, "B R R 3"]:
    """Negative log-density of mapped pixels under the logit-Laplace distribution.

    -ln f(x | mu, b) = ln(2b) + ln(x(1-x)) + |logit(x) - mu| / b: of a density, so it can be < 0.

    Args:
      x: pixels in (0, 1), as `image.pixels.map_pixels` gives them.
      stats: mu and ln b, as the decoder gives them.
      min_log_scale: ln b = min_log_scale + softplus(raw - min_log_scale) if given (ours): without a
        floor a flat white background can be made as likely as one likes, and the model spends
        itself on it. None is the paper's form.
    Returns:
      nats per pixel and channel.
    Source: Ramesh et al. 2021, appendix A.3.
    """
    mu, log_b = jnp.split(stats, 2, axis=-1)
    if min_log_scale is not None:
        log_b = min_log_scale + jax.nn.softplus(log_b - min_log_scale)
    logit = jnp.log(x) - jnp.log1p(-x)
    return jnp.log(2.0) + log_b + jnp.log(x * (1 - x)) + jnp.abs(logit - mu) * jnp.exp(-log_b)


def kl_to_uniform(logits: Float[Array, "B G G K"]) -> Float[Array, "B G G"]:
    """KL(q || uniform) of each cell's categorical, from the plain logits: ln K + sum q ln q.

    Source: Ramesh et al. 2021, section 2.1; the plain logits, not the relaxed sample, by the
    author's answer in openai/DALL-E issue 26.
    """
    log_q = jax.nn.log_softmax(logits)
    return np.log(logits.shape[-1]) + jnp.sum(jnp.exp(log_q) * log_q, axis=-1)


def gumbel_softmax(
    key: Array, logits: Float[Array, "B G G K"], temperature: Float[Array, ""] | float
) -> Float[Array, "B G G K"]:
    """One relaxed sample per cell, fed to the decoder as it is (soft, not straight-through).

    Source: Ramesh et al. 2021, section 2.1.
    """
    return jax.nn.softmax((logits + jax.random.gumbel(key, logits.shape)) / temperature)


def rare_code_penalty(
    logits: Float[Array, "B G G K"], *, min_share: float = 1 / 8
) -> Float[Array, ""]:
    """How far codes have fallen below a share of their fair part of the batch, in nats (ours).

    The mean over codes of max(0, ln(min_share / K) - ln q_k), with q_k the mean of q over all
    cells of the batch. Its gradient pulls on each vanishing code with equal strength, however
    small its probability, where that of the KL term dies with the code.

    Args:
      logits: plain encoder logits.
      min_share: the part of 1 / K below which a code counts as rare.
    """
    K = logits.shape[-1]
    log_q = jax.nn.log_softmax(logits).reshape(-1, K)
    log_share = jax.nn.logsumexp(log_q, axis=0) - np.log(log_q.shape[0])
    return jnp.mean(jax.nn.relu(np.log(min_share / K) - log_share))


def codebook_loss(
    z: Float[Array, "B G G D"], entries: Float[Array, "B G G D"], *, commitment: float = 0.25
) -> Float[Array, ""]:
    """Mean squared distance of features to their codes: moves the codes, and features less so.

    Args:
      z: features of each cell.
      entries: what stands in the codebook for the code of each.
      commitment: weight beta of the part that moves the features.
    Source: van den Oord et al. 2017, equation 3; the release of Esser et al. 2021 has the weight on
      the other part by a slip that its authors name.
    """
    to_codes = jnp.square(jax.lax.stop_gradient(z) - entries).mean()
    return to_codes + commitment * jnp.square(z - jax.lax.stop_gradient(entries)).mean()


def unused_code_pull(
    z: Float[Array, "B G G D"], table: Float[Array, "K D"], codes: Int[Array, "B G G"]
) -> Float[Array, ""]:
    """Mean squared distance of each code that no cell of the batch has chosen to its nearest cell.

    Its gradient moves the codes alone, towards where features are, until cells choose them: what
    the gradient of `codebook_loss` never does for a code without cells (ours).
    """
    K, D = table.shape
    cells = jax.lax.stop_gradient(z).reshape(-1, D)
    # |e|^2 is the same for all cells, so the nearest has the least |z|^2 - 2 e z
    to_cells = jnp.square(cells).sum(-1)[None] - 2 * table @ cells.T
    target = cells[to_cells.argmin(axis=1)]
    unused = jnp.ones(K).at[codes.ravel()].set(0)
    return jnp.mean(unused[:, None] * jnp.square(table - target))


def hinge_loss(real: Float[Array, "B S S"], drawn: Float[Array, "B S S"]) -> Float[Array, ""]:
    """What a discriminator learns from: scores above 1 of real and below -1 of drawn patches.

    Source: Esser et al. 2021, the authors' release.
    """
    return (jax.nn.relu(1 - real).mean() + jax.nn.relu(1 + drawn).mean()) / 2


def prior_loss(
    text_logits: Float[Array, "B P V"],
    image_logits: Float[Array, "B I K"],
    text: Int[Array, "B P"],
    codes: Int[Array, "B I"],
) -> tuple[Float[Array, ""], Metrics]:
    """1/8 of the mean cross-entropy of text tokens plus 7/8 of that of image tokens.

    Each mean is over the tokens of its kind in the batch. Pads are no tokens: their slots do not
    count (ours; the paper does not say).

    Args:
      text_logits: one distribution for each caption slot.
      image_logits: one distribution for each image token.
      text: caption slots; ids from V on are pads.
      codes: image tokens in raster order.
    Returns:
      The loss, and "text_nats" and "image_nats" per token.
    Source: Ramesh et al. 2021, section 2.2 and appendix B.2.
    """
    V = text_logits.shape[-1]
    is_token = text < V
    text_nats = cross_entropy(text_logits, jnp.minimum(text, V - 1))
    text_mean = _mean(text_nats, is_token)
    image_mean = jnp.mean(cross_entropy(image_logits, codes))
    loss = prior_mean(text_mean, image_mean)
    return loss, {"text_nats": text_mean, "image_nats": image_mean}


def prior_mean(
    text_nats: float | Float[Array, ""], image_nats: float | Float[Array, ""]
) -> float | Float[Array, ""]:
    """The loss of nats per token: 1/8 of the text's and 7/8 of the image's."""
    return text_nats / 8 + image_nats * 7 / 8


def contrastive_loss(
    image: Float[Array, "B E"],
    text: Float[Array, "B E"],
    scale: Float[Array, ""],
    tokens: Int[Array, "B P"],
) -> tuple[Float[Array, ""], Metrics]:
    """Symmetric InfoNCE: images choose among the batch's captions, captions among its images.

    A caption may stand in the batch more than once, under different images. All of them are right
    then, to equal parts (ours): each image's target is spread over the captions equal to its
    own, and each caption's over the images of equal captions. Of B different captions this is the
    plain loss.

    Args:
      image: features of the images, of length 1.
      text: features of their captions, of length 1, in the same order.
      scale: what similarities are multiplied by, the inverse of the temperature.
      tokens: the captions' tokens, to see which are equal.
    Returns:
      The mean of both cross-entropies, in nats, and "image_to_text" and "text_to_image", the shares
      of the batch whose likeliest choice was right.
    Source: Radford et al. 2021, section 2.3 and figure 3.
    """
    same = (tokens[:, None] == tokens[None]).all(axis=-1)  # B B; symmetric, so good for both ways
    target = same / same.sum(axis=1, keepdims=True)
    logits = scale * jnp.einsum("AE,BE->AB", image, text)
    loss, metrics = jnp.float32(0), {}
    for name, choice in (("image_to_text", logits), ("text_to_image", logits.T)):
        loss -= jnp.sum(target * jax.nn.log_softmax(choice), axis=1).mean() / 2
        right = jnp.take_along_axis(same, choice.argmax(axis=1, keepdims=True), axis=1)
        metrics[name] = right.mean()
    return loss, metrics


def _mean(x, chosen):
    return jnp.sum(jnp.where(chosen, x, 0)) / jnp.maximum(jnp.sum(chosen), 1)


def cross_entropy(
    logits: Float[Array, "*places K"], labels: Int[Array, "*places"]
) -> Float[Array, "*places"]:
    """Nats of each label."""
    chosen = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen

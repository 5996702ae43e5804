"""A page of features: for each latent the tokens that excite it most, within their texts."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse.sae import hooks
from jaxsparse.sae.scaffold import SAE

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 62rem; padding: 0 1rem;
       background: #fff; color: #222; }
h2 { font-size: 1.05rem; margin: 2rem 0 .3rem; border-top: 1px solid #ccc; padding-top: .8rem; }
p.numbers { color: #555; margin: 0 0 .4rem; }
p.text { font: 13px/1.6 ui-monospace, monospace; margin: .25rem 0; white-space: pre-wrap; overflow-wrap: anywhere; }
span.value { color: #777; display: inline-block; width: 4rem; }
mark { color: inherit; border-radius: 2px; }
mark.top { outline: 1.5px solid #b3400a; }
"""


def top_examples(
    model: SAE,
    network: hooks.Network,
    site: str,
    batches: Iterable[Any],
    latents: Sequence[int],
    *,
    count: int = 8,
    part: hooks.Part = "output",
    skip_first: int = 0,
) -> tuple[list[list[tuple[np.ndarray, np.ndarray, int]]], np.ndarray]:
    """For each latent the sequences with its largest activations.

    Args:
      model: of unscaled activations.
      network, site, part, skip_first: as of `Activations`.
      batches: of integer tokens `[B, T]`, what the network is called with.
      latents: which.
      count: sequences of each, of different places.

    Returns:
      Per latent a list, best first, of `(tokens [T], activations [T], position of the largest)`; and
      the density of each latent, the fraction of tokens that it is active for.

    Raises:
      ValueError: a latent that the model does not have; no batch.
    """
    for i in latents:
        if not 0 <= i < model.d_sae:
            raise ValueError(f"latents: {i} is not one of 0 to {model.d_sae - 1}")
    chosen = jnp.asarray(latents, jnp.int32)
    best: list[list[tuple[float, np.ndarray, np.ndarray, int]]] = [[] for _ in latents]
    active, seen = np.zeros(len(latents)), 0
    encode = jax.jit(
        lambda batch: model.encode(hooks.capture(network, site, batch, part=part))[..., chosen]
    )
    for batch in batches:
        codes, tokens = np.array(encode(batch)), np.asarray(batch)
        codes[:, :skip_first] = 0.0
        active += (codes != 0).sum((0, 1))
        seen += codes[:, skip_first:, 0].size
        for j, found in enumerate(best):
            for row, f in zip(tokens, codes[..., j]):
                peak = int(f.argmax())
                if f[peak] > 0:
                    found.append((float(f[peak]), row, f, peak))
            found.sort(key=lambda item: -item[0])
            del found[count:]
    if not seen:
        raise ValueError("batches: are empty; give at least one")
    return [[item[1:] for item in found] for found in best], active / seen


def dashboard(
    examples: list[list[tuple[np.ndarray, np.ndarray, int]]],
    density: np.ndarray,
    latents: Sequence[int],
    decode: Callable[[list[int]], str],
    *,
    title: str = "Features",
    context: int = 24,
) -> str:
    """A page in HTML that needs nothing else: the darker a token, the more active the latent.

    The most active token of a text has a frame, every active one its activation as a tooltip; dots say that the text goes
    on. Characters of several tokens are shown once, tokens without text by their number.

    Args:
      examples, density: as `top_examples` gives them.
      latents: their numbers.
      decode: of a list of tokens to text, such as `tokenizer.decode`.
      title: of the page.
      context: tokens shown before the largest activation; half as many after it.

    Raises:
      ValueError: a negative context; examples or densities of another number of latents.

    >>> one = [[(np.array([7, 8]), np.array([0.0, 2.0]), 1)]]
    >>> page = dashboard(one, np.array([0.5]), [3], lambda ids: f"<{ids[0]}>")
    >>> "Latent 3" in page and "&lt;8&gt;" in page
    True
    """
    if context < 0:
        raise ValueError(f"context={context}: give a number of tokens that is not negative")
    if not len(latents) == len(examples) == len(density):
        raise ValueError(
            f"{len(examples)} lists of examples and {len(density)} densities for {len(latents)} latents: give one for each"
        )
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">',
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{html.escape(title)}</h1>",
    ]
    for number, found, share in zip(latents, examples, density):
        largest = max((float(f.max()) for _, f, _ in found), default=0.0)
        parts.append(f"<h2>Latent {number}</h2>")
        parts.append(
            f'<p class="numbers">active for {100 * share:.2f} % of tokens; '
            f"largest activation {largest:.3g}</p>"
        )
        if not found:
            parts.append('<p class="numbers">never active on these texts</p>')
        for tokens, f, peak in found:
            start, stop = max(peak - context, 0), min(peak + context // 2 + 1, len(tokens))
            words = [
                _word(text, float(f[i:j].max()), largest, i <= peak < j)
                for text, i, j in _texts(tokens, start, stop, decode)
            ]
            value = f'<span class="value">{f[peak]:.3g}</span>'
            before, after = "…" * (start > 0), "…" * (stop < len(tokens))
            parts.append(f'<p class="text">{value}{before}{"".join(words)}{after}</p>')
    return "\n".join([*parts, "</body></html>"])


def _texts(
    tokens: np.ndarray, start: int, stop: int, decode: Callable[[list[int]], str]
) -> Iterator[tuple[str, int, int]]:
    """Texts with the places they are from: one token, or the up to four bytes of one character."""
    while start < stop:
        ends = range(start + 1, min(start + 4, stop) + 1)
        text, end = decode([int(tokens[start])]), start + 1
        if "\ufffd" in text:
            tried = ((decode([int(t) for t in tokens[start:e]]), e) for e in ends)
            text, end = next(((x, e) for x, e in tried if "\ufffd" not in x), (text, end))
        yield text or f"⟨{tokens[start]}⟩", start, end
        start = end


# What HTML does not allow in a text, or does not show, as Unicode's pictures of it.
_SHOWN = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {
    0x7F: 0x2421,
    ord("\n"): "↵",
}


def _word(text: str, value: float, largest: float, top: bool) -> str:
    shown = html.escape(text.translate(_SHOWN))
    if value <= 0:
        return shown
    colour = f"background: rgba(240, 130, 40, {min(value / largest, 1.0):.2f})"
    kind = "top" if top else "on"
    return f'<mark class="{kind}" style="{colour}" title="{value:.3g}">{shown}</mark>'
